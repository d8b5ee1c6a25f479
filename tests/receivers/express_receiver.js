// The receiver of the guide ("Signature Verification (Node.js)"), on a free port, which it prints.
const crypto = require('crypto');
const express = require('express');

const app = express();
app.use(express.json());

function verifyWebhookSignature(req) {
  const signature = req.headers['x-webhook-signature'];
  const timestamp = req.headers['x-webhook-timestamp'];
  const secret = process.env.CLOUDRUN_CALLBACK_SECRET;

  if (!signature || !timestamp) {
    throw new Error('Missing signature or timestamp headers');
  }

  // Check timestamp is recent (prevent replay attacks)
  const now = Math.floor(Date.now() / 1000);
  const timeDiff = Math.abs(now - parseInt(timestamp));
  if (timeDiff > 300) { // 5 minutes tolerance
    throw new Error('Timestamp too old or too far in future');
  }

  // Verify signature format
  if (!signature.startsWith('sha256=')) {
    throw new Error('Invalid signature format');
  }

  const providedSignature = signature.slice(7); // Remove 'sha256=' prefix

  // Recompute signature
  const payloadString = JSON.stringify(req.body);
  const expectedSignature = crypto
    .createHmac('sha256', secret)
    .update(`${timestamp}.${payloadString}`)
    .digest('hex');

  // Constant-time comparison
  if (!crypto.timingSafeEqual(
    Buffer.from(providedSignature, 'hex'),
    Buffer.from(expectedSignature, 'hex')
  )) {
    throw new Error('Invalid signature');
  }

  return true;
}

app.post('/webhooks/claude-complete', async (req, res) => {
  try {
    // Verify signature before processing
    verifyWebhookSignature(req);
    res.status(200).json({ received: true });
  } catch (error) {
    console.error('Webhook verification failed:', error.message);
    res.status(401).json({ error: 'Unauthorized' });
  }
});

const server = app.listen(0, '127.0.0.1', () => console.log(server.address().port));
