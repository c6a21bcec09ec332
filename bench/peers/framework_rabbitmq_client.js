// rabbitmq-client's Consumer: reconnects, and acks when the handler's promise is kept.
"use strict";
const { Connection } = require("rabbitmq-client");
const fs = require("fs");

const [mode, url, ...numbers] = process.argv.slice(2);
const [size, count, prefetch] = numbers.map(Number);
const queue = process.env.BENCH_QUEUE;

function now() {
  return Number(process.hrtime.bigint()) / 1e9;
}

function cpu() {
  const use = process.cpuUsage();
  return (use.user + use.system) / 1e6;
}

function die(what) {
  console.error("peer:", what && what.message || what);
  process.exit(1);
}

function report(started) {
  console.log(JSON.stringify({
    messages: count,
    seconds: now() - started.wall,
    cpu_us: (cpu() - started.cpu) / count * 1e6,
    rss_kb: Number(/VmHWM:\s+(\d+)/.exec(
      fs.readFileSync("/proc/self/status", "latin1"))[1]),
  }));
}

async function consume() {
  const rabbit = new Connection(url);
  rabbit.on("error", die);
  let left = count, started, finish;
  const done = new Promise((resolve) => { finish = resolve; });
  const consumer = rabbit.createConsumer({
    queue,
    queueOptions: { durable: true },
    qos: { prefetchCount: prefetch },
  }, async (message) => {
    started ||= { wall: now(), cpu: cpu() };
    if (message.body.length !== size) die("a body of another size");
    if (--left === 0) finish();
  });
  consumer.on("error", die);
  await done;
  await consumer.close(); // its channel: the acks are there
  report(started);
  await rabbit.close();
}

if (mode !== "consume" || numbers.length !== 3) {
  die("usage: framework_rabbitmq_client.js consume URL SIZE COUNT PREFETCH");
}
consume().catch(die);
