// A caller with grpc-js. It passes messages as bytes, so it needs no generated code:
//
//   node main.js ADDRESS SCENARIO MESSAGE_FILE
//
// prints one line of JSON: code, message, details and answers (base64).
const fs = require("fs");
const grpc = require("@grpc/grpc-js");

const [address, scenario, file] = process.argv.slice(2);
const message = fs.readFileSync(file);
const service = "/digits.v1.DigitClassifierService/";
const same = (bytes) => bytes;
const client = new grpc.Client(address, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": -1,
  "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
});
const inTime = (ms) => ({ deadline: Date.now() + ms });

function result(error, answers, calls = 1) {
  const details = error && error.metadata ? error.metadata.get("grpc-status-details-bin")[0] : null;
  return {
    code: error ? error.code : 0,
    message: error ? error.details : "",
    details: details ? details.toString("base64") : null,
    answers: answers.map((bytes) => bytes.toString("base64")),
    calls,
  };
}

function unary(options) {
  return new Promise((resolve) => {
    const call = client.makeUnaryRequest(
      `${service}Classify`, same, same, message, new grpc.Metadata(), options,
      (error, answer) => resolve(result(error, answer ? [answer] : [])),
    );
    if (scenario === "cancel") setTimeout(() => call.cancel(), 0);
  });
}

function stream(count) {
  return new Promise((resolve) => {
    const call = client.makeBidiStreamRequest(
      `${service}ClassifyStream`, same, same, new grpc.Metadata(), inTime(60_000),
    );
    const answers = [];
    call.on("data", (answer) => answers.push(answer));
    call.on("error", (error) => resolve(result(error, answers)));
    call.on("end", () => resolve(result(null, answers)));
    for (let i = 0; i < count; i++) call.write(message);
    call.end();
  });
}

async function calls() {
  let stopped = false;
  process.stdin.on("end", () => { stopped = true; });
  process.stdin.resume();
  for (let count = 1; ; count++) {
    const one = await unary(inTime(60_000));
    if (one.code || stopped) return { ...one, answers: [], calls: count };
    if (count === 50) console.log("started");
  }
}

const scenarios = {
  unary: () => unary(inTime(60_000)),
  cancel: () => unary({}),
  deadline: () => unary({ deadline: Date.now() - 1 }),
  stream: () => stream(100),
  calls,
};
scenarios[scenario]().then((said) => {
  process.stdout.write(`${JSON.stringify(said)}\n`, () => process.exit(0));
});
