// Prints each JSON line of its input as JavaScript prints the value that it reads.
let rest = Buffer.alloc(0);
process.stdin.on('data', (chunk) => {
  rest = Buffer.concat([rest, chunk]);
  // By byte: readline would also split at U+2028, which JSON strings may hold.
  for (let end; (end = rest.indexOf(0x0a)) >= 0; rest = rest.subarray(end + 1)) {
    process.stdout.write(JSON.stringify(JSON.parse(rest.subarray(0, end).toString())) + '\n');
  }
});
