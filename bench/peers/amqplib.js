// amqplib's callback API, its quicker one. NODE_PATH tells where it is.
"use strict";
const amqp = require("amqplib/callback_api");
const fs = require("fs");

const [mode, url, ...numbers] = process.argv.slice(2);
const [size, count, window] = numbers.map(Number);
const queue = process.env.BENCH_QUEUE || `bench-${size}`;
const properties = { persistent: true, mandatory: true };
let started, cpuStarted;

function die(what) {
  console.error("peer:", what && what.message || what);
  process.exit(1);
}

function must(next) {
  return (error, value) => error ? die(error) : next(value);
}

function now() {
  return Number(process.hrtime.bigint()) / 1e9;
}

function cpu() {
  const use = process.cpuUsage();
  return (use.user + use.system) / 1e6;
}

function start() {
  cpuStarted = cpu();
  started = now();
}

function report(conn, trips) {
  const out = {
    messages: count,
    seconds: now() - started,
    cpu_us: (cpu() - cpuStarted) / count * 1e6,
    rss_kb: Number(/VmHWM:\s+(\d+)/.exec(
      fs.readFileSync("/proc/self/status", "latin1"))[1]),
  };
  if (trips) {
    trips.sort();
    out.median_us = trips[count >> 1] * 1e6;
  }
  console.log(JSON.stringify(out));
  conn.removeAllListeners("error");
  conn.close(() => process.exit(0));
}

function publish(conn, ch) {
  const body = Buffer.alloc(size, "x");
  let sent = 0, settled = 0, paused = false;
  function confirmed(error) {
    if (error) die("nacked");
    settled++;
    if (settled === count) report(conn);
    else more();
  }
  function more() {
    while (!paused && sent < count && sent - settled < window) {
      sent++;
      paused = !ch.publish("", queue, body, properties, confirmed);
    }
  }
  ch.on("drain", () => {
    paused = false;
    more();
  });
  start();
  more();
}

function roundtrip(conn, ch) {
  const body = Buffer.alloc(size, "x");
  const trips = new Float64Array(count);
  let i = 0, sent;
  function one() {
    sent = now();
    ch.publish("", queue, body, properties, (error) => {
      if (error) die("nacked");
      trips[i++] = now() - sent;
      if (i === count) report(conn, trips);
      else one();
    });
  }
  start();
  one();
}

function consume(conn, ch) {
  let left = count;
  ch.prefetch(window);
  start();
  ch.consume(queue, (message) => {
    if (left === 0) return;
    if (message.content.length !== size) die("a body of another size");
    ch.ack(message);
    if (--left === 0) ch.checkQueue(queue, must(() => report(conn)));
  }, { noAck: false }, must(() => {}));
}

const modes = { publish, consume, roundtrip };
if (!modes[mode] || numbers.length !== 3) die("usage: amqplib.js MODE URL SIZE COUNT WINDOW");
amqp.connect(url, must((conn) => {
  conn.on("error", die);
  const open = mode === "consume" ? "createChannel" : "createConfirmChannel";
  conn[open](must((ch) => {
    ch.on("error", die);
    ch.assertQueue(queue, { durable: true }, must(() => modes[mode](conn, ch)));
  }));
}));
