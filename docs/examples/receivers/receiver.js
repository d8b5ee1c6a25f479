// Receives callbacks of ccrun and verifies their raw bytes before it parses them. Needs only Node 18 or newer.
//   CLOUDRUN_CALLBACK_SECRET=… PORT=3000 node receiver.js
'use strict';

const crypto = require('node:crypto');
const http = require('node:http');

const TOLERANCE_SECONDS = 300;
const MAX_BODY_BYTES = 4 * 1024 * 1024;
const secret = process.env.CLOUDRUN_CALLBACK_SECRET;
if (!secret) throw new Error('CLOUDRUN_CALLBACK_SECRET is not set');

function isGenuine(headers, body) {
  const timestamp = headers['x-webhook-timestamp'] ?? '';
  const given = Buffer.from(headers['x-webhook-signature'] ?? '');
  const hmac = crypto.createHmac('sha256', secret).update(`${timestamp}.`).update(body);
  const expected = Buffer.from(`sha256=${hmac.digest('hex')}`);
  const isFresh = Math.abs(Date.now() / 1000 - Number(timestamp)) <= TOLERANCE_SECONDS;
  return isFresh && given.length === expected.length && crypto.timingSafeEqual(given, expected);
}

const server = http.createServer((request, response) => {
  const pieces = [];
  let size = 0;
  request.on('data', (piece) => {
    size += piece.length;
    if (size > MAX_BODY_BYTES) request.destroy();
    else pieces.push(piece);
  });
  request.on('end', () => {
    const body = Buffer.concat(pieces);
    if (!isGenuine(request.headers, body)) {
      response.writeHead(401).end();
      return;
    }
    // Respond first and process the outcome afterwards. The same outcome may be delivered twice.
    response.writeHead(200, { 'Content-Type': 'application/json' }).end('{"received":true}');
    const { taskId, status, error } = JSON.parse(body);
    console.log(`Task ${taskId} is ${status}${error ? `: ${error}` : ''}`);
  });
});

server.listen(Number(process.env.PORT ?? 3000), () => console.log(`listening on ${server.address().port}`));
