-- Retries on the ladder of wait queues: when messages come home, what their copies carry, and what becomes of them
-- when something of the ladder is missing, full or somebody else's.
local broker = require "support.broker"
local support = require "support.disposal"
local native = require "moonrabbit.runtime.native"
local ok = broker.ok

local it = broker.it_unless(it, pending, broker.none())
local failure = { message = "it failed", kind = "error", traceback = "stack traceback: …" }

describe("retry", function()
  local bench

  local function start(options)
    bench = support.start(options)
    return bench.d
  end

  after_each(function()
    if bench then bench:finish() end
    bench = nil
  end)

  it("comes home after the delay, not early", function()
    local d = start()
    local msg = bench:deliver "hello"
    assert.equal(1, d:attempt(msg))
    local began = native.now()
    assert.is_true(ok(d:retry(msg, 0.5, failure)))
    ok(msg:ack())
    msg = bench:receive()
    assert.is_true(native.now() - began >= 0.5)
    assert.equal("hello", msg.body)
    assert.equal(2, d:attempt(msg))
    assert.same({ "", bench.queue }, { d:origin(msg) })
    assert.equal("it failed", msg.headers["moonrabbit-error"])
    assert.equal("error", msg.headers["moonrabbit-error-kind"])
    assert.equal(bench.queue, msg.headers["moonrabbit-queue"])
    msg:ack()
  end)

  it("keeps no message behind another with a longer delay", function()
    local d = start()
    local long, short = bench:deliver "long", bench:deliver "short"
    ok(d:retry(long, 2, failure))
    ok(d:retry(short, 0.1, failure))
    long:ack()
    short:ack()
    assert.equal("short", bench:receive().body)
    assert.equal("long", bench:receive().body)
  end)
end)
