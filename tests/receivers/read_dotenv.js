// For each line of its input, the path of a .env in JSON, prints what dotenv reads there: as it does by default, and with `fast`.
const dotenv = require('dotenv');
const readline = require('readline');

readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const read = (fast) => Object.entries(dotenv.config({ path: JSON.parse(line), processEnv: {}, quiet: true, fast }).parsed);
  console.log(JSON.stringify([read(false), read(true)]));
});
