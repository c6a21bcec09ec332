-- Retries on the ladder of wait queues: when messages come home, what their copies carry, and what becomes of them
-- when something of the ladder is missing, full or somebody else's.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local support = require "support.disposal"
local dead_letter = require "moonrabbit.app.dead_letter"
local ladder = require "moonrabbit.app.ladder"
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
    ok(d.ladder:exchange(bench.out, 100)) -- what a new step costs is no part of the race
    local long, short = bench:deliver "long", bench:deliver "short"
    ok(d:retry(long, 2, failure))
    ok(d:retry(short, 0.1, failure))
    long:ack()
    short:ack()
    assert.equal("short", bench:receive().body)
    assert.equal("long", bench:receive().body)
  end)

  -- Retries a message once and takes it when it is home.
  local function trip(msg, delay, attempt)
    ok(bench.d:retry(msg, delay or 0.1, failure, attempt))
    ok(msg:ack())
    return bench:receive()
  end

  it("counts attempts, and keeps the time of the first failure", function()
    local now = 1700000000
    local d = start { now = function() return now end }
    local msg = bench:deliver()
    for attempt = 2, 4 do
      msg = trip(msg)
      assert.equal(attempt, d:attempt(msg))
      assert.equal(1700000000, msg.headers["moonrabbit-first-failure"])
      assert.equal(now, msg.headers["moonrabbit-last-failure"])
      now = now + 60
    end
    msg = trip(msg, 0.1, 9) -- attempts in the process count too
    assert.equal(10, d:attempt(msg))
    msg:ack()
  end)

  it("changes nothing of a message but what it must", function()
    start()
    local types = moonrabbit.types
    local headers = {
      text = "héllo\0bytes", empty = "", yes = true, int = 42, float = 1.5, list = { 1, "two", { 3 } },
      map = { nested = { deep = true } }, void = moonrabbit.null, stamp = types.timestamp(1700000000),
      bytes = types.bytes "\1\2", i8 = types.int8(-8), single = types.float(0.5), price = types.decimal(1234, 2),
      i64 = types.int64 "9007199254740993", traceparent = "00-abc",
    }
    local given = {
      content_type = "application/json", content_encoding = "utf-8", priority = 7, correlation_id = "corr",
      reply_to = "answers", message_id = "id-1", timestamp = 1700000000, type = "order.created", app_id = "spec",
      user_id = broker.parsed().user, headers = headers,
    }
    local original = bench:deliver("\0body\255", given)
    local before, properties = original.headers, original.properties
    local copy = trip(original)
    assert.equal("\0body\255", copy.body)
    assert.equal(tostring(properties.timestamp), tostring(copy.properties.timestamp))
    for name, value in pairs(properties) do
      if name ~= "headers" and name ~= "timestamp" then assert.equal(value, copy.properties[name], name) end
    end
    for name, value in pairs(before) do
      local got = copy.headers[name]
      assert.equal(type(value), type(got), name)
      if type(value) == "table" then assert.same(value, got) else assert.equal(tostring(value), tostring(got), name) end
    end
    copy:ack()
  end)

  it("leaves an expiration and CC behind, so that no trip ends early or delivers to others", function()
    start()
    local other = ok(bench.ch:queue_declare("", { exclusive = true })).queue
    local msg = bench:deliver("x", { expiration = "60000", headers = { CC = { other } } })
    local began = native.now()
    for _ = 1, 2 do
      msg = trip(msg, 0.3)
      assert.is_nil(msg.properties.expiration)
      assert.is_nil(msg.headers.CC)
      assert.equal("60000", msg.headers["moonrabbit-expiration"])
      assert.same({ other }, msg.headers["moonrabbit-cc"])
    end
    assert.is_true(native.now() - began >= 0.6)
    msg:ack()
    ok(bench.ch:get(other)):ack()
    assert.is_false(ok(bench.ch:get(other)))
    -- One that is shorter than the step.
    msg = bench:deliver("y", { expiration = "5000" })
    msg = trip(msg, 0.5)
    assert.equal("5000", msg.headers["moonrabbit-expiration"])
    msg:ack()
  end)

  it("comes home as often as it likes after the broker has dead-lettered it: expired, and over a delivery limit",
    function()
      start()
      local d = bench.d
      local arguments = { ["x-dead-letter-exchange"] = "", ["x-dead-letter-routing-key"] = bench.queue }
      local expiring, limited = bench.name .. ".expiring", bench.name .. ".limited"
      arguments["x-message-ttl"] = 1
      ok(bench.ch:queue_declare(expiring, { durable = true, arguments = arguments }))
      arguments["x-message-ttl"] = nil
      arguments["x-queue-type"], arguments["x-delivery-limit"] = "quorum", 1
      ok(bench.ch:queue_declare(limited, { durable = true, arguments = arguments }))
      ok(bench:publisher():publish("expired", { routing_key = expiring }))
      ok(bench:publisher():publish("poison", { routing_key = limited }))
      local ch = ok(bench.out:channel())
      local poison = ok(ch:consume(limited))
      for _ = 1, 2 do ok(poison:receive(10)):nack { requeue = true } end
      local seen = {}
      for _ = 1, 6 do
        local msg = bench:receive()
        local attempt = d:attempt(msg)
        seen[#seen + 1] = msg.body .. " " .. attempt
        if attempt == 1 then assert.truthy(msg.headers["x-death"]) end
        if attempt == 3 then
          local deaths = msg.headers["moonrabbit-deaths"]
          local reason = msg.body == "expired" and "expired" or "delivery_limit"
          assert.equal(1, #deaths["x-death"])
          assert.equal(reason, deaths["x-death"][1].reason)
          assert.equal(reason, deaths["x-first-death-reason"])
        else
          ok(d:retry(msg, 0.1, failure))
        end
        msg:ack()
      end
      table.sort(seen)
      assert.same({ "expired 1", "expired 2", "expired 3", "poison 1", "poison 2", "poison 3" }, seen)
      ok(ch:queue_delete(expiring))
      ok(ch:queue_delete(limited))
    end)

  it("moves a user id that is not its own, which the broker would refuse", function()
    if broker.not_ours() then return pending(broker.not_ours()) end
    start()
    local api = broker.management()
    ok(api:set_user("spec-other", { password = "secret", tags = "" }))
    ok(api:set_permissions("/", "spec-other", {}))
    local other = broker.connect { uri = broker.uri { user = "spec-other", password = "secret" } }
    local ch = ok(other:channel { confirm = true })
    ok(ch:publish("theirs", { routing_key = bench.queue, user_id = "spec-other" }))
    local msg = bench:receive()
    assert.equal("spec-other", msg.properties.user_id)
    msg = trip(msg)
    assert.is_nil(msg.properties.user_id)
    assert.equal("spec-other", msg.headers["moonrabbit-user-id"])
    msg:ack()
    other:close()
    ok(api:delete_user "spec-other")
  end)

  it("shortens what it adds where the headers are nearly as large as a frame", function()
    start { connect = { frame_max = 8192 } }
    local long = { message = ("é"):rep(3000), kind = "error", traceback = ("t"):rep(5000) }
    local function parked(size)
      local msg = bench:deliver("x", { headers = { big = ("x"):rep(size) } })
      ok(bench.d:dead_letter(msg, "attempts", long))
      msg:ack()
      local copy = bench:take(bench.d.parking)
      assert.equal(size, #copy.headers.big)
      assert.equal(1, copy.headers["moonrabbit-attempts"])
      assert.equal(bench.queue, copy.headers["moonrabbit-key"])
      return copy.headers
    end
    local all = parked(1000)
    assert.is_true(#all["moonrabbit-error"] <= 1024)
    assert.equal("…", (all["moonrabbit-error"]:gsub("é", "")))
    assert.is_true(#all["moonrabbit-traceback"] <= 4096)
    local some = parked(7000)
    assert.is_true(#some["moonrabbit-error"] <= 200)
    assert.is_nil(some["moonrabbit-traceback"])
    local least = parked(7600)
    assert.is_nil(least["moonrabbit-error"])
    assert.is_nil(least["moonrabbit-reason"])
  end)

  it("says so, and gives back, where headers are too large to add to; a dead letter goes without a word", function()
    local d = start { connect = { frame_max = 8192 } }
    local function no_room(done, err)
      assert.is_nil(done)
      assert.equal("overflow", err.kind)
      assert.is_false(err.temporary)
      assert.truthy(err.message:find("leave no room", 1, true), err.message)
    end
    local msg = bench:deliver("x", { headers = { big = ("x"):rep(8080) }, expiration = "60000" })
    no_room(d:retry(msg, 1, failure))
    ok(d:dead_letter(msg, "attempts", failure))
    msg:ack()
    local letter = bench:take(d.parking)
    local names = {}
    for header in pairs(letter.headers) do
      if header ~= "x-delivery-count" then names[#names + 1] = header end -- of the parking queue
    end
    assert.same({ "big" }, names)
    assert.is_nil(letter.properties.expiration)
    -- No room for the number that a confirmed copy carries.
    msg = bench:deliver("x", { headers = { big = ("x"):rep(8145) }, mandatory = false })
    no_room(d:dead_letter(msg, "attempts", failure))
    ok(d:give_back(msg, 0.05))
    msg = bench:receive()
    assert.is_true(msg.redelivered)
    assert.equal(8145, #msg.headers.big)
    msg:ack()
  end)

  it("declares a step again that somebody deleted", function()
    local d = start()
    local ch = ok(bench.conn:channel())
    local step = d.ladder:wait_name(100)
    local msg = trip(bench:deliver())
    ok(ch:queue_delete(step))
    msg = trip(msg)
    ok(ch:exchange_delete(step))
    msg = trip(msg)
    assert.equal(4, d:attempt(msg))
    msg:ack()
  end)

  it("says so when a wait queue is somebody else's, and waits in the process meanwhile", function()
    local d = start()
    local step = d.ladder:wait_name(1000)
    ok(bench.ch:queue_declare(step, { durable = true, arguments = { ["x-message-ttl"] = 5 } }))
    local msg = bench:deliver()
    assert.is_false(d:in_process(msg, 1))
    local done, err = d:retry(msg, 1, failure)
    assert.is_nil(done)
    assert.equal(406, err.code)
    assert.truthy(err.message:find("it is there, with other properties", 1, true), err.message)
    assert.truthy(err.message:find(step, 1, true))
    assert.truthy(bench.logged[1]:find "^error: the retry of a message of .* failed")
    assert.is_true(d:in_process(msg, 1))
    assert.is_false(d:in_process(msg, 2))
    ok(d:give_back(msg, 0.05))
    msg = bench:receive()
    msg = trip(msg, 0.2)
    msg:ack()
    assert.equal(0, bench:count(step))
  end)

  it("tells a user without the permission what to do, and uses a ladder that exists", function()
    if broker.not_ours() then return pending(broker.not_ours()) end
    start()
    local api = broker.management()
    ok(api:set_user("spec-poor", { password = "secret", tags = "" }))
    ok(api:set_permissions("/", "spec-poor", { configure = "^$", write = ".*", read = ".*" }))
    local poor = broker.connect { uri = broker.uri { user = "spec-poor", password = "secret" } }
    local done, err = ladder.new(bench.name):setup(poor, { bench.queue })
    assert.is_nil(done)
    assert.equal(403, err.code)
    assert.truthy(err.message:find("topology apply", 1, true), err.message)
    -- What topology apply makes.
    local existing = ladder.new { name = bench.name, mode = "existing" }
    local missing
    done, missing = existing:exchange(poor, 200)
    assert.is_nil(done)
    assert.equal(404, missing.code)
    ok(bench.d.ladder:exchange(bench.conn, 100))
    ok(existing:setup(poor, { bench.queue }))
    ok(existing:exchange(poor, 100))
    -- The parking queue is there, and is used.
    bench.out = poor
    bench.d.ladder = existing
    ok(bench.d:setup(ok(poor:channel())))
    local msg = trip(bench:deliver())
    ok(bench.d:dead_letter(msg, "attempts", failure))
    msg:ack()
    assert.equal(1, bench:count(bench.d.parking))
    poor:close()
    bench.out = broker.connect()
    ok(api:delete_user "spec-poor")
  end)

  it("keeps messages whose home was deleted among the orphans, and lets others pass", function()
    local d = start()
    local gone = support.start { consumer = { ladder = d.ladder } }
    local homeless = gone:deliver "orphan"
    ok(gone.ch:queue_delete(gone.queue)) -- first, or it may be home before
    ok(gone.d:retry(homeless, 0.3, failure))
    local msg = trip(bench:deliver "mine", 0.3)
    assert.equal("mine", msg.body)
    msg:ack()
    broker.eventually(function() return bench:count(d.ladder.orphans) == 1 end, 10, "an orphan")
    local orphan = bench:take(d.ladder.orphans)
    assert.equal("orphan", orphan.body)
    assert.equal(gone.queue, orphan.headers["moonrabbit-queue"])
    ok(bench.ch:queue_delete(gone.d.parking))
  end)

  it("keeps messages waiting while their home is full", function()
    if broker.not_ours() then return pending(broker.not_ours()) end
    -- How long the broker waits before it offers them again: three minutes, unless told otherwise.
    local function offer_again_after(ms)
      broker.ctl("eval", ("application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, %d)."):format(ms))
    end
    offer_again_after(500)
    finally(function() offer_again_after(180000) end)
    local d = start { queue = { ["x-max-length"] = 1, ["x-overflow"] = "reject-publish" } }
    local msg = bench:deliver "first"
    ok(bench:publisher():publish("in the way", { routing_key = bench.queue }))
    ok(bench.consuming:cancel())
    broker.eventually(function() return bench:count(bench.queue) == 1 end, 10, "a full queue")
    ok(d:retry(msg, 0.1, failure))
    msg:ack()
    moonrabbit.sleep(0.3)
    assert.equal(1, bench:count(bench.queue))
    local seen = {}
    broker.eventually(function()
      local got = bench:take(bench.queue)
      if got then seen[#seen + 1] = got.body end
      return #seen == 2
    end, 60, "both messages")
    assert.same({ "in the way", "first" }, seen)
    bench.consuming = nil
  end)

  it("uses classic wait queues on an old broker, says so, and goes on with them on a new one", function()
    local d = start()
    local server = bench.out.server
    bench.out.server = function() return { version = "3.9.27" } end
    local msg = trip(bench:deliver())
    assert.truthy(bench.logged[1]:find("classic queues, which dead-letter at most once", 1, true))
    bench.out.server = server
    d.ladder:forget(100)
    msg = trip(msg)
    assert.equal(3, d:attempt(msg))
    msg:ack()
    assert.equal(1, #bench.logged)
  end)

  it("retries in the process only where it is told to, and declares nothing", function()
    local d = start { consumer = { in_process = true } }
    assert.is_true(d:in_process(nil, 3600))
    local ch = ok(bench.conn:channel())
    local _, err = ch:exchange_declare(d.ladder.home, { passive = true })
    assert.equal(404, err.code)
  end)
end)

describe("a dead letter", function()
  local bench

  local function start(options)
    bench = support.start(options)
    return bench.d
  end

  after_each(function()
    if bench then bench:finish() end
    bench = nil
  end)

  it("tells everything", function()
    local d = start { now = function() return 1700000100 end }
    ok(bench.ch:queue_bind(bench.queue, "amq.topic", bench.name .. ".#"))
    local key = bench.name .. ".eu"
    local msg = bench:deliver("poison", { exchange = "amq.topic", routing_key = key, headers = { mine = 1 },
      message_id = "m-1", expiration = "60000" })
    ok(d:dead_letter(msg, "attempts", failure, 3))
    msg:ack()
    local letter = bench:take(d.parking)
    assert.equal("poison", letter.body)
    assert.equal(1, letter.headers.mine)
    assert.equal("m-1", letter.properties.message_id)
    assert.is_nil(letter.properties.expiration)
    assert.same({
      by = "app", app = bench.name, reason = "attempts", error = "it failed", error_kind = "error",
      traceback = "stack traceback: …", attempts = 3, first_failure = 1700000100, time = 1700000100,
      exchange = "amq.topic", routing_key = key, queue = bench.queue, replays = 0,
    }, dead_letter.read(letter))
  end)

  it("that somebody moves back to its queue begins anew, and counts again", function()
    local d = start()
    local msg = bench:deliver "moved"
    ok(d:dead_letter(msg, "attempts", failure, 5))
    msg:ack()
    local letter = ok(bench:publisher():get(d.parking))
    ok(letter:forward("", bench.queue)) -- as a shovel does
    letter:ack()
    for attempt = 1, 3 do
      msg = bench:receive()
      assert.equal(attempt, d:attempt(msg))
      if attempt < 3 then ok(d:retry(msg, 0.1, failure)) end
      msg:ack()
    end
    assert.is_nil(msg.headers["moonrabbit-reason"])
    assert.is_nil(msg.headers["moonrabbit-dead-at"])
    assert.equal(bench.queue, msg.headers["moonrabbit-key"])
  end)

  it("that a route decided on tells of no error", function()
    local d = start()
    ok(d:dead_letter(bench:deliver(), "no route"))
    local read = dead_letter.read(bench:take(d.parking))
    assert.equal("no route", read.reason)
    assert.is_nil(read.error)
    assert.equal(1, read.attempts)
  end)

  it("waits, unacked, for room in a queue that is full", function()
    local parking = broker.unique "full"
    local ch = ok(broker.connect():channel { confirm = true })
    ok(ch:queue_declare(parking, { durable = true,
      arguments = { ["x-max-length"] = 1, ["x-overflow"] = "reject-publish" } }))
    ok(ch:publish("in the way", { routing_key = parking }))
    local d = start { consumer = { dead_letter = parking } }
    assert.truthy(bench.logged[1]:find("is used as it is", 1, true))
    local msg = bench:deliver "poison"
    d.hold = 0
    local done, err = d:dead_letter(msg, "attempts", failure)
    assert.is_nil(done)
    assert.equal("nacked", err.kind)
    ok(d:give_back(msg, 0.05))
    msg = bench:receive()
    assert.is_true(msg.redelivered)
    d.hold = 60
    moonrabbit.spawn(function()
      broker.eventually(function() return #bench.logged == 3 end, 10, "a second report")
      ok(ch:queue_purge(parking))
    end)
    ok(d:dead_letter(msg, "attempts", failure))
    msg:ack()
    assert.equal("poison", ok(ch:get(parking, { no_ack = true })).body)
    ok(ch:queue_delete(parking))
  end)

  it("does not wait any longer once it is told to stop, or the original is gone", function()
    local parking = broker.unique "full"
    local ch = ok(broker.connect():channel())
    ok(ch:queue_declare(parking, { durable = true,
      arguments = { ["x-max-length"] = 0, ["x-overflow"] = "reject-publish" } }))
    local d = start { consumer = { dead_letter = parking } }
    local msg = bench:deliver "poison"
    moonrabbit.spawn(function()
      broker.eventually(function() return #bench.logged == 2 end, 10, "a report")
      d:stop()
    end)
    local done, err = d:dead_letter(msg, "attempts", failure)
    assert.is_nil(done)
    assert.equal("nacked", err.kind)
    d.stopped = false
    moonrabbit.spawn(function()
      broker.eventually(function() return #bench.logged == 3 end, 10, "a report")
      bench.ch:close()
    end)
    assert.is_nil((d:dead_letter(msg, "attempts", failure)))
    local none, closed = d:give_back(msg, 60)
    assert.is_nil(none)
    assert.equal("closed", closed.kind)
    broker.eventually(function() return bench:count(bench.queue) == 1 end, 10, "the original")
    ok(ch:queue_delete(parking))
  end)

  it("finds its queue again when somebody deleted it", function()
    local d = start()
    local msg = bench:deliver "poison"
    ok(bench.conn:channel()):queue_delete(d.parking)
    ok(d:dead_letter(msg, "attempts", failure))
    msg:ack()
    assert.equal("poison", bench:take(d.parking).body)
  end)

  it("needs a queue", function()
    local d = start { consumer = { dead_letter = false } }
    local msg = bench:deliver()
    assert.has_error(function() d:dead_letter(msg, "x", failure) end)
    msg:ack()
  end)
end)
