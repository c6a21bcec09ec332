local core = require "moonrabbit.core"
local fake = require "support.fake_broker"
local guard = require "support.guard"
local process = require "support.process"

local short, u8, u16, u32, u64 = fake.short, fake.u8, fake.u16, fake.u32, fake.u64

local function fails(text, fn, ...)
  local ok, err = pcall(fn, ...)
  assert.is_false(ok)
  assert.truthy(tostring(err):find(text, 1, true), "'" .. tostring(err) .. "' does not contain '" .. text .. "'")
end

describe("the handshake #smoke", function()
  it("goes from the protocol header to open", function()
    local b = fake.new { heartbeat = 30, channel_max = 100, client_properties = { connection_name = "spec" } }
    b.engine:start(0)
    assert.equal("AMQP\0\0\9\1", b.engine:drain(0))
    b:send(b:start_frame())
    local start_ok = b:sent()[1]
    assert.equal("10.11", start_ok.id)
    assert.truthy(start_ok.args:find("connection_name", 1, true))
    assert.truthy(start_ok.args:find("\0guest\0secret", 1, true))
    b:send(fake.method(0, 10, 30, u16(2047) .. u32(131072) .. u16(60)))
    local sent = b:sent()
    assert.equal("10.31", sent[1].id)
    assert.equal("10.40", sent[2].id)
    assert.is_false(b.engine:is_open())
    b:send(fake.method(0, 10, 41, short ""))
    assert.same({ { "open" } }, b:take())
    assert.is_true(b.engine:is_open())
    assert.same({ 100, 131072, 30 }, { b.engine:tuned() })
    assert.equal("Fake", b.engine:server_properties().product)
    assert.is_number(b.engine:deadline(0))
  end)

  it("says that the port speaks something else", function()
    local b = fake.new()
    b.engine:start(0)
    b:send "HTTP/1.1 400 Bad Request\r\n\r\n"
    local event = b:one()
    assert.equal("closed", event[1])
    assert.equal("protocol", event[2].kind)
    assert.truthy(event[2].text:find "HTTP")
  end)

  it("ends at end of file", function()
    local b = fake.new()
    b.engine:start(0)
    b.engine:eof "reset by peer"
    b:pump()
    local event = b:one()
    assert.equal("closed", event[1])
    assert.truthy(event[2].text:find("reset by peer", 1, true))
    assert.is_nil((b.engine:pump()))
  end)

  it("refuses options that cannot be", function()
    fails("unknown config 'vhots'", core.engine, { vhots = "/" })
    fails("config 'heartbeat': out of range", core.engine, { heartbeat = 70000 })
    fails("config 'heartbeat': number expected", core.engine, { heartbeat = "60" })
    fails("config 'mechanism'", core.engine, { mechanism = "MAGIC" })
    fails("client_properties: table expected", core.engine, { client_properties = 1 })
    fails("client_properties.a: a function", core.engine, { client_properties = { a = print } })
    fails("table expected", core.engine)
    assert.is_false((pcall(core.engine, { frame_max = 100 })))
  end)
end)

describe("a connection #smoke", function()
  it("is closed from both sides", function()
    local b = fake.new():open()
    assert.is_true(b.engine:close(200, "bye"))
    assert.equal("10.50", b:sent()[1].id)
    b:send(fake.method(0, 10, 51))
    assert.equal("closed", b:one()[1])

    b = fake.new():open()
    b:send(fake.method(0, 10, 50, u16(320) .. short "shutdown" .. u16(0) .. u16(0)))
    local event = b:one()
    assert.equal(320, event[2].code)
    assert.is_nil(event[2].class)
    assert.equal("10.51", b:sent()[1].id)
    assert.same({ "closed" }, { select(2, b.engine:close()) })
    assert.same({ nil, "closed" }, { b.engine:open_channel {} })
  end)

  it("reports blocked and unblocked", function()
    local b = fake.new():open()
    b:send(fake.method(0, 10, 60, short "low on memory"))
    assert.same({ { "blocked", "low on memory" } }, b:take())
    assert.is_true(b.engine:is_blocked())
    local channel = b:channel()
    assert.same({ nil, "blocked" }, { channel:publish "x" })
    b:send(fake.method(0, 10, 61))
    assert.same({ { "unblocked" } }, b:take())
    assert.is_true((channel:publish "x"))
  end)

  it("holds publishing for this side, whatever the broker says", function()
    local b = fake.new():open()
    local channel = b:channel()
    b.engine:hold(true)
    assert.is_false(b.engine:is_blocked())
    assert.same({ nil, "blocked" }, { channel:publish "x" })
    b:send(fake.method(0, 10, 60, short "low on memory"), fake.method(0, 10, 61))
    assert.same({ nil, "blocked" }, { channel:publish "x" })
    b.engine:hold(false)
    assert.is_true((channel:publish "x"))
  end)

  it("updates its secret", function()
    local b = fake.new():open()
    assert.is_true(b.engine:update_secret("new", "because"))
    assert.equal("10.70", b:sent()[1].id)
    b:send(fake.method(0, 10, 71))
    assert.same({ { "reply", nil, "connection.update-secret-ok", {} } }, b:take())
  end)

  it("ends on garbage, and says so", function()
    local b = fake.new():open()
    b:send(("x"):rep(100))
    local event = b:one()
    assert.equal("closed", event[1])
    assert.equal("protocol", event[2].kind)
    assert.is_true(#event[2].text > 0)
  end)

  it("sends heartbeats and misses them", function()
    local b = fake.new({ heartbeat = 10 }):open { heartbeat = 10 }
    b.now = 6
    b.engine:tick(6)
    local sent = b:sent()
    assert.equal(8, sent[1] and sent[1].kind)
    for now = 7, 40 do
      b.now = now
      b.engine:tick(now)
      b:pump()
      b:sent()
    end
    assert.equal("timeout", b:one()[2].kind)
  end)

  it("drains in one string, however much there is", function()
    local b = fake.new({ max_buffer = 4194304 }):open()
    local channel = b:channel()
    local body = ("x"):rep(300000)
    for _ = 1, 5 do channel:publish(body, { routing_key = "q" }) end
    assert.is_true(b.engine:pending() > 1500000)
    local bytes = b.engine:drain(0)
    assert.equal(0, b.engine:pending())
    local total = 0
    for _, frame in ipairs(fake.frames(bytes)) do
      if frame.kind == 3 then total = total + #frame.payload end
    end
    assert.equal(1500000, total)
    assert.equal("", b.engine:drain(0))
  end)

  it("drains in pieces, and costs no more memory than they have", function()
    local b = fake.new():open()
    local channel = b:channel()
    local n, size = 0, 65536
    for i = 1, 100 do assert.truthy(channel:publish(tostring(i):rep(4000), { routing_key = "q" })) end
    local all = b.engine:pending()
    local pieces = { b.engine:drain(0, size) }
    collectgarbage()
    collectgarbage "stop"
    local before = collectgarbage "count"
    repeat
      pieces[#pieces + 1] = b.engine:drain(0, size)
    until b.engine:pending() == 0
    local took = (collectgarbage "count" - before) * 1024
    collectgarbage "restart"
    local bytes = table.concat(pieces)
    assert.equal(all, #bytes)
    assert.truthy(took < 1.1 * all, ("%d bytes for %d"):format(took, all))
    for _, frame in ipairs(fake.frames(bytes)) do
      if frame.kind == 3 then
        n = n + 1
        assert.equal(tostring(n):rep(4000), frame.payload)
      end
    end
    assert.equal(100, n)
  end)

  -- In a process of its own: how often a finalizer meets a drain is a matter of the heap's size.
  it("drains while finalizers write: nothing is lost, nothing comes twice", function()
    local result = process.run({ "spec/support/finalizers.lua" }, { timeout = 120 })
    assert.equal(0, result.code, result.err)
    assert.matches("^%d+ messages, %d+ of them by finalizers during a drain\n$", result.out)
  end)
end)

describe("methods #smoke", function()
  local b, channel, owner
  before_each(function()
    b = fake.new():open()
    channel, owner = b:channel()
  end)

  it("go out with their fields and come back with theirs", function()
    local arguments = { ["x-max-length"] = 10.0 }
    assert.is_true(channel:call("queue.declare", { queue = "q", durable = true, arguments = arguments }))
    local frame = b:sent()[1]
    assert.equal("50.10", frame.id)
    assert.equal(u16(0) .. short "q" .. u8(2), frame.args:sub(1, 5))
    assert.same({ ["x-max-length"] = 10 }, core.decode_table(frame.args:sub(6)))
    assert.equal("I", frame.args:sub(-5, -5))
    b:send(fake.method(1, 50, 11, short "q" .. u32(3) .. u32(1)))
    local event = b:one()
    assert.equal("reply", event[1])
    assert.equal(owner, event[2])
    assert.equal("queue.declare-ok", event[3])
    assert.same({ queue = "q", message_count = 3, consumer_count = 1 }, event[4])
  end)

  it("are known by name", function()
    local calls = {
      ["exchange.declare"] = { "40.10", { exchange = "e", type = "topic" } },
      ["exchange.delete"] = { "40.20", { exchange = "e", if_unused = true } },
      ["exchange.bind"] = { "40.30", { destination = "a", source = "b", routing_key = "k", arguments = {} } },
      ["exchange.unbind"] = { "40.40", { destination = "a", source = "b" } },
      ["queue.bind"] = { "50.20", { queue = "q", exchange = "e" } },
      ["queue.unbind"] = { "50.50", { queue = "q", exchange = "e" } },
      ["queue.purge"] = { "50.30", { queue = "q" } },
      ["queue.delete"] = { "50.40", { queue = "q", if_empty = true } },
      ["basic.qos"] = { "60.10", { prefetch_count = 10, global = true } },
      ["basic.recover"] = { "60.110", { requeue = true } },
      ["tx.select"] = { "90.10" },
    }
    for name, call in pairs(calls) do
      assert.is_true((channel:call(name, call[2])), name)
      local sent = b:sent()
      assert.equal(call[1], sent[#sent].id)
    end
  end)

  it("refuse wrong fields, naming them", function()
    fails("queue.declare: unknown field 'durabel'", channel.call, channel, "queue.declare", { durabel = true })
    fails("queue.declare: field 'durable': boolean expected, got number", channel.call, channel, "queue.declare",
      { durable = 1 })
    fails("field 'queue': string expected", channel.call, channel, "queue.declare", { queue = 1 })
    fails("field 'queue': longer than 255", channel.call, channel, "queue.declare", { queue = ("q"):rep(256) })
    fails("arguments: table expected", channel.call, channel, "queue.declare", { arguments = 1 })
    fails("arguments.x: a function", channel.call, channel, "queue.declare", { arguments = { x = print } })
    for _, n in ipairs { 65536, -1, 1.5 } do
      fails("field 'prefetch_count': not an integer in range", channel.call, channel, "basic.qos",
        { prefetch_count = n })
    end
    fails("the name of a field", channel.call, channel, "basic.qos", { 1 })
    fails("'queue.destroy' cannot be called", channel.call, channel, "queue.destroy", {})
    fails("'basic.ack' cannot be called", channel.call, channel, "basic.ack", {})
    fails("consumer_tag", channel.consume, channel, { queue = "q" })
    assert.equal("", b.engine:drain(0))
  end)

  it("report channel errors, and then are refused", function()
    channel:call("queue.declare", { queue = "q", passive = true })
    b:sent()
    b:send(fake.method(1, 20, 40, u16(404) .. short "NOT_FOUND - no queue 'q'" .. u16(50) .. u16(10)))
    local event = b:one()
    assert.equal("channel_closed", event[1])
    assert.equal(owner, event[2])
    assert.same({ kind = "channel", code = 404, class = 50, method = 10, text = "NOT_FOUND - no queue 'q'" }, event[3])
    assert.is_false(channel:is_open())
    assert.same({ nil, "closed" }, { channel:call("queue.purge", { queue = "q" }) })
    assert.same({ nil, "closed" }, { channel:publish "x" })
    assert.same({ nil, "closed" }, { channel:consume { queue = "q", consumer_tag = "c" } })
  end)

  it("close a channel, whose number is then free", function()
    assert.equal(1, channel:id())
    assert.is_true(channel:close(200, "done"))
    assert.equal("20.40", b:sent()[1].id)
    b:send(fake.method(1, 20, 41))
    local event = b:one()
    assert.equal("channel.close-ok", event[3])
    assert.equal(owner, event[2])
    local again = b:channel()
    assert.equal(1, again:id())
  end)

  it("report flow", function()
    b:send(fake.method(1, 20, 20, u8(0)))
    assert.same({ "flow", owner, false }, b:one())
    assert.same({ nil, "blocked" }, { channel:publish "x" })
  end)

  it("get", function()
    assert.is_true(channel:get("q", false))
    b:send(fake.method(1, 60, 71, u64(1) .. u8(1) .. short "ex" .. short "key" .. u32(7)) .. fake.content(1, "body"))
    local event = b:one()
    assert.equal("get", event[1])
    assert.equal(owner, event[2])
    local m = event[3]
    assert.same({ "body", "ex", "key", true, 1, 7 },
      { m.body, m.exchange, m.routing_key, m.redelivered, m.delivery_tag, m.message_count })
    assert.is_nil(m.consumer_tag)
    assert.is_nil(m.reply_code)
    assert.is_boolean((core.ack(m)))
    channel:get("q", true)
    b:send(fake.method(1, 60, 72, short ""))
    assert.equal("basic.get-empty", b:one()[3])
  end)
end)

describe("core.acker #smoke", function()
  local b, channel, queue, tag, fulls, flushed, ack
  before_each(function()
    b = fake.new { ack_delay = 1 }:open()
    channel, tag, fulls, flushed = b:channel(), 0, 0, {}
    channel:call("basic.qos", { prefetch_count = 40 })
    b:send(fake.method(1, 60, 11))
    queue = b:consumer(channel, "tag")
    b:sent()
    ack = core.acker(function(message)
      fulls = fulls + 1
      local flush, why = core.ack(message)
      if flush == nil then error("not acked: " .. why, 2) end
      return true, "full"
    end, function(owner) flushed[#flushed + 1] = owner end)
  end)

  local function message()
    tag = tag + 1
    b:send(fake.deliver(1, "tag", tag, "x"))
    return queue:pop()
  end

  it("calls Lua once until the output is looked at", function()
    assert.same({ true, "full" }, { ack(message()) })
    assert.same({ true }, { ack(message()) })
    assert.same({ true }, { ack(message()) })
    assert.equal(1, fulls)
    assert.is_true(channel:flush_acks())
    assert.equal("60.80", b:sent()[1].id) -- one ack with `multiple`
    assert.equal(0, channel:unsettled())
    assert.same({ true, "full" }, { ack(message()) })
    assert.equal(2, fulls)
  end)

  it("asks for a flush when a quarter of the prefetch is gathered", function()
    local owner
    for i = 1, 10 do
      assert.same({}, flushed)
      local m = message()
      owner = m.channel
      assert.is_true((ack(m)), i)
    end
    assert.same({ owner }, flushed)
    assert.equal(1, fulls)
  end)

  it("leaves to Lua what cannot be acked, and lets it throw", function()
    local m = message()
    ack(m)
    fails("not acked: settled", ack, m)
    assert.equal(2, fulls)
    local late = message()
    b.engine:eof()
    b:pump()
    fails("not acked: closed", ack, late)
    fails("moonrabbit.message expected", ack, channel)
    fails("function expected", core.acker, nil, print)
    fails("function expected", core.acker, print)
  end)
end)

describe("publish #smoke", function()
  local b, channel, owner
  before_each(function()
    b = fake.new():open()
    channel, owner = b:channel(true)
  end)

  it("sends three frames", function()
    local plain = b:channel()
    assert.same({ true, false }, { plain:publish("hello", { exchange = "e", routing_key = "k" }) })
    local sent = b:sent()
    assert.equal("60.40", sent[1].id)
    assert.equal(u16(0) .. short "e" .. short "k" .. u8(0), sent[1].args)
    assert.equal(u16(60) .. u16(0) .. u64(5) .. u16(0), sent[2].payload)
    assert.equal("hello", sent[3].payload)
  end)

  it("is mandatory, persistent and numbered with confirms", function()
    local c, flush = channel:publish("hello", { routing_key = "k" })
    assert.equal("userdata", type(c))
    assert.is_false(flush)
    local sent = b:sent()
    assert.equal(1, sent[1].args:byte(-1))
    assert.truthy(sent[2].payload:find("moonrabbit-seq", 1, true))
    assert.equal(2, sent[2].payload:byte(-1))
    channel:publish("x", { persistent = false, mandatory = false })
    sent = b:sent()
    assert.equal(0, sent[1].args:byte(-1))
    assert.equal(u16(0), sent[2].payload:sub(13))
  end)

  it("carries every property", function()
    local props = {
      content_type = "text/plain", content_encoding = "gzip", headers = { a = 1, b = { c = { true, "x" } } },
      delivery_mode = 2, priority = 9, correlation_id = "corr", reply_to = "back", expiration = "60000",
      message_id = "id", timestamp = 1700000000, type = "kind", user_id = "guest", app_id = "app", cluster_id = "c",
    }
    channel:publish("x", props)
    local raw = b:sent()[2].payload:sub(13)
    b:consumer(channel, "c")
    b:send(fake.deliver(1, "c", 1, "x", { properties = raw }))
    local message = b:take()[1][3]:pop()
    assert.same(props, message.properties)
    assert.equal(message.properties, message.properties)
    assert.equal(message.headers, message.properties.headers)
  end)

  it("takes expiration as a number and timestamp as a typed value", function()
    channel:publish("x", { expiration = 1500, timestamp = core.types.timestamp(5), timeout = 3 })
    local payload = b:sent()[2].payload
    assert.truthy(payload:find(short "1500" .. u64(5), 1, true))
  end)

  it("refuses wrong options, naming them, and sends nothing", function()
    local wrong = {
      { "unknown option 'routing'", { routing = "x" } },
      { "option 'routing_key': string expected, got number", { routing_key = 1 } },
      { "option 'routing_key': longer than 255", { routing_key = ("k"):rep(256) } },
      { "option 'exchange': longer than 255", { exchange = ("k"):rep(256) } },
      { "option 'mandatory': boolean expected", { mandatory = 1 } },
      { "option 'persistent': boolean expected", { persistent = "yes" } },
      { "option 'delivery_mode': out of range", { delivery_mode = 3 } },
      { "option 'priority': out of range", { priority = 256 } },
      { "option 'priority': not an integer", { priority = 1.5 } },
      { "option 'timestamp': out of range", { timestamp = -1 } },
      { "option 'expiration': out of range", { expiration = -1 } },
      { "option 'expiration': not an integer", { expiration = 0 / 0 } },
      { "headers: table expected", { headers = "x" } },
      { "headers.a.b: a function", { headers = { a = { b = print } } } },
      { "option 'message_id': string expected", { message_id = 12 } },
      { "the name of an option", { "x" } },
    }
    for _, case in ipairs(wrong) do fails(case[1], channel.publish, channel, "x", case[2]) end
    fails("table expected", channel.publish, channel, "x", "y")
    fails("string expected", channel.publish, channel, nil)
    fails("string expected", channel.publish, channel, 12)
    assert.equal("", b.engine:drain(0))
    assert.equal(0, channel:unconfirmed())
    assert.same({ nil, "too_large" }, { channel:publish("x", { headers = { a = ("x"):rep(200000) } }) })
  end)

  it("learns of acks, one by one and multiple", function()
    local c = {}
    for i = 1, 200 do c[i] = channel:publish("x", { routing_key = "q" }) end
    assert.equal(200, channel:unconfirmed())
    assert.is_false(core.acked(c[1]))
    b:send(fake.ack(1, 2))
    assert.same({ { "confirm", owner } }, b:take())
    assert.is_false(core.acked(c[1]))
    assert.is_true(core.acked(c[2]))
    b:send(fake.ack(1, 100, true), fake.ack(1, 150))
    assert.same({ { "confirm", owner } }, b:take())
    for i = 1, 200 do assert.equal(i <= 100 or i == 150, core.acked(c[i])) end
    assert.same({ "pending", 101 }, { core.outcome(c[101]) })
    assert.same({ "acked", 100 }, { core.outcome(c[100]) })
    assert.equal(99, channel:unconfirmed())
    assert.equal(owner, core.owner(c[1]))
  end)

  it("learns of nacks, all before Lua runs", function()
    local c = {}
    for i = 1, 100 do c[i] = channel:publish("x", { routing_key = "q" }) end
    assert.is_true(b.engine:feed(fake.nack(1, 50, true) .. fake.ack(1, 60, true), 0) > 0)
    local event = { b.engine:pump() }
    assert.same({ "failed", owner, 1, "nacked", c[1] }, event)
    for i = 1, 50 do assert.is_nil(core.acked(c[i])) end
    b:pump()
    local events = b:take()
    assert.equal(50, #events)
    assert.same({ "failed", owner, 50, "nacked", c[50] }, events[49])
    assert.same({ "confirm", owner }, events[50])
    assert.is_true(core.acked(c[60]))
    assert.equal("nacked", (core.outcome(c[7])))
  end)

  it("learns of returned messages", function()
    local c = channel:publish("lost", { routing_key = "nowhere" })
    local other = channel:publish("kept", { routing_key = "q" })
    local raw = b:sent()[2].payload:sub(13)
    b:send(fake.returned(1, "lost", { properties = raw, routing_key = "nowhere" }))
    local event = b:one()
    assert.equal("return", event[1])
    assert.equal(1, event[4])
    local m = event[3]
    assert.same({ "lost", 312, "NO_ROUTE", "nowhere" }, { m.body, m.reply_code, m.reply_text, m.routing_key })
    assert.same({}, m.headers)
    assert.is_nil(m.properties.headers)
    assert.is_nil(m.delivery_tag)
    assert.same({ nil, "unknown_tag" }, { core.ack(m) })
    assert.is_false(core.acked(c))
    b:send(fake.ack(1, 2, true))
    assert.same({ { "failed", owner, 1, "unroutable", c }, { "confirm", owner } }, b:take())
    assert.equal("unroutable", (core.outcome(c)))
    assert.is_true(core.acked(other))
  end)

  it("calls lost what was pending when the channel or connection ended", function()
    local a, c = channel:publish "x", channel:publish "y"
    b:send(fake.ack(1, 1))
    b:take()
    b:send(fake.method(1, 20, 40, u16(406) .. short "PRECONDITION" .. u16(0) .. u16(0)))
    assert.equal("channel_closed", b:one()[1])
    assert.is_true(core.acked(a))
    assert.is_nil(core.acked(c))
    assert.equal("lost", (core.outcome(c)))
    assert.equal(0, channel:unconfirmed())

    local second = b:channel(true)
    local d = second:publish "z"
    b.engine:eof()
    b:pump()
    assert.equal("closed", b:one()[1])
    assert.equal("lost", (core.outcome(d)))
    assert.same({ nil, "closed" }, { second:publish "z" })
  end)

  it("counts what was lost", function()
    assert.equal(0, channel:lost())
    for _ = 1, 5 do channel:publish "x" end
    b:send(fake.ack(1, 2, true))
    b:take()
    assert.equal(0, channel:lost())
    b:send(fake.method(1, 20, 40, u16(406) .. short "PRECONDITION" .. u16(0) .. u16(0)))
    assert.same({ 3, 0 }, { channel:lost(), channel:unconfirmed() })

    local second = b:channel(true)
    second:publish "z"
    b.engine:eof()
    b:pump()
    assert.same({ 1, 0 }, { second:lost(), second:unconfirmed() })
    assert.equal(3, channel:lost())
  end)

  it("has confirmations that say who they are", function()
    local _, c = channel:publish "x", channel:publish "y"
    assert.equal("moonrabbit.confirmation: channel 1, 2 pending", tostring(c))
  end)

  it("keeps to its window", function()
    channel:set_window(3)
    local c = {}
    for i = 1, 3 do c[i] = assert(channel:publish "x") end
    assert.same({ nil, "window" }, { channel:publish "x" })
    b:send(fake.ack(1, 1))
    b:take()
    assert.truthy((channel:publish "x"))
    assert.is_true(core.acked(c[1]))
  end)

  it("keeps failures apart while the window grows", function()
    local c = {}
    for i = 1, 50 do c[i] = channel:publish "x" end
    b:send(fake.ack(1, 40, true))
    for i = 51, 1000 do c[i] = channel:publish "x" end
    b:send(fake.nack(1, 41), fake.nack(1, 1000), fake.ack(1, 999, true))
    for i = 1, 1000 do
      local outcome = (i == 41 or i == 1000) and "nacked" or "acked"
      assert.equal(outcome, (core.outcome(c[i])))
    end
  end)

  it("works when confirmations are thrown away", function()
    for _ = 1, 300 do channel:publish "x" end
    collectgarbage()
    b:send(fake.nack(1, 7))
    local event = b:one()
    assert.equal("failed", event[1])
    assert.equal(7, event[3])
    assert.equal("userdata", type(event[5]))
  end)

  it("asks to flush when much is waiting", function()
    local flush
    for _ = 1, 300 do
      local _, now = channel:publish(("x"):rep(1000))
      flush = flush or now
    end
    assert.is_true(flush)
  end)

  it("stops at max_buffer", function()
    local small = fake.new({ max_buffer = 10000 }):open()
    local ch = small:channel()
    local status
    for _ = 1, 30 do status = select(2, ch:publish(("x"):rep(1000))) end
    assert.equal("overflow", status)
  end)
end)

describe("a route #smoke", function()
  it("publishes as publish does", function()
    local b = fake.new():open()
    local channel, owner = b:channel(true)
    local opts = { exchange = "e", routing_key = "k", headers = { a = 1 }, content_type = "t" }
    channel:publish("body", opts)
    local function without_number(bytes) return (bytes:gsub("moonrabbit%-seql" .. ("."):rep(8), "")) end
    local want = without_number(b.engine:drain(0))
    local route = core.route(opts, true)
    local c, flush = channel:publish_route(route, "body")
    assert.equal(want, without_number(b.engine:drain(0)))
    assert.is_false(flush)
    assert.equal(owner, core.owner(c))
    b:send(fake.ack(1, 2, true))
    assert.is_true(core.acked(c))
    local plain = b:channel()
    assert.is_true((plain:publish_route(core.route({}, false), "x")))
  end)

  it("checks its options once", function()
    fails("unknown option 'a'", core.route, { a = 1 }, true)
    fails("headers: table expected", core.route, { headers = "x" }, true)
    fails("boolean expected", core.route, {}, 1)
  end)
end)

describe("deliveries #smoke", function()
  local b, channel, owner, queue
  before_each(function()
    b = fake.new():open()
    channel, owner = b:channel()
    queue = b:consumer(channel, "tag")
  end)

  it("are put into the queue of their consumer, told once", function()
    b:send(fake.deliver(1, "tag", 1, "one", { exchange = "e", routing_key = "k", redelivered = true }),
      fake.deliver(1, "tag", 2, "two"))
    assert.same({ { "deliver", owner, queue } }, b:take())
    assert.equal(2, queue:count())
    local m = queue:pop()
    assert.same({ "one", "e", "k", true, 1, "tag", owner },
      { m.body, m.exchange, m.routing_key, m.redelivered, m.delivery_tag, m.consumer_tag, m.channel })
    assert.is_nil(m.message_count)
    assert.is_nil(m.reply_code)
    assert.is_nil(m.reply_text)
    assert.is_nil(m.nonsense)
    assert.is_nil(m[1])
    assert.is_true(core.is_message(m))
    assert.is_false(core.is_message(queue))
    assert.is_false(core.is_message "x")
    assert.equal(owner, core.owner(m))
    assert.truthy(tostring(m):find("e/k", 1, true))
    fails("a message cannot be changed", function() m.body = "x" end)
    b:send(fake.deliver(1, "tag", 3, "three"))
    assert.same({}, b:take())
    assert.equal("two", queue:pop().body)
    assert.equal("three", queue:pop().body)
    assert.is_nil(queue:pop())
    b:send(fake.deliver(1, "tag", 4, "four"))
    assert.same({ { "deliver", owner, queue } }, b:take())
  end)

  it("keep their order while the queue grows and wraps", function()
    local sent, got = 0, 0
    for round = 1, 40 do
      local frames = {}
      for i = 1, round * 3 do
        sent = sent + 1
        frames[i] = fake.deliver(1, "tag", sent, tostring(sent))
      end
      b:send(table.concat(frames))
      for _ = 1, round * 2 do
        got = got + 1
        assert.equal(tostring(got), queue:pop().body)
      end
    end
    while queue:count() > 0 do
      got = got + 1
      assert.equal(tostring(got), queue:pop().body)
    end
    assert.equal(sent, got)
  end)

  it("have bodies of any size, and methods", function()
    core.message_methods.spec_method = function(m) return #m.body end
    for i, size in ipairs { 0, 1, 2048, 2049, 131064, 131065, 500000 } do
      local body = ("b"):rep(size)
      b:send(fake.deliver(1, "tag", i, body))
      local m = queue:pop()
      assert.equal(body, m.body)
      assert.equal(size, m:spec_method())
      assert.equal(owner, m.channel)
    end
    core.message_methods.spec_method = nil
  end)

  it("hide the publish number among headers", function()
    local raw = u16(0x2000) .. core.encode_table { ["moonrabbit-seq"] = 5, mine = "x" }
    b:send(fake.deliver(1, "tag", 1, "x", { properties = raw }))
    local m = queue:pop()
    assert.same({ mine = "x" }, m.headers)
    assert.same({ headers = { mine = "x" } }, m.properties)
    assert.equal(m.headers, m.headers)
  end)

  it("are acked together", function()
    channel:call("basic.qos", { prefetch_count = 100 })
    b:send(fake.method(1, 60, 11))
    b:take()
    b:sent()
    local frames = {}
    for i = 1, 30 do frames[i] = fake.deliver(1, "tag", i, "x") end
    b:send(table.concat(frames))
    local flush
    for i = 1, 30 do
      local now, who = core.ack(queue:pop())
      assert.equal(owner, who)
      assert.is_boolean(now)
      if i < 25 then assert.is_false(now) end
      flush = flush or now
    end
    assert.is_true(flush)
    assert.equal(0, channel:unsettled())
    b.now = b.now + 1
    b.engine:tick(b.now)
    local last
    for _, frame in ipairs(b:sent()) do
      if frame.id == "60.80" then last = frame end
    end
    assert.equal(u64(30) .. u8(1), last.args)
  end)

  it("are settled once", function()
    b:send(fake.deliver(1, "tag", 1, "x"), fake.deliver(1, "tag", 2, "y"), fake.deliver(1, "tag", 3, "z"))
    local one, two, three = queue:pop(), queue:pop(), queue:pop()
    assert.is_boolean((core.settle(one, "nack", true)))
    assert.equal("60.120", b:sent()[1].id)
    assert.same({ nil, "settled" }, { core.ack(one) })
    assert.is_boolean((core.settle(two, "reject", false)))
    assert.equal("60.90", b:sent()[1].id)
    assert.same({ nil, "settled" }, { core.settle(two, "nack", true) })
    fails("'nack' or 'reject' expected", core.settle, three, "ack")
    fails("moonrabbit.message expected", core.ack, queue)
    fails("moonrabbit.message expected", core.ack, {})
    b:send(fake.method(1, 20, 40, u16(406) .. short "X" .. u16(0) .. u16(0)))
    assert.same({ nil, "closed" }, { core.ack(three) })
    assert.same({ nil, "settled" }, { core.ack(one) })
    assert.equal("z", three.body)
    assert.same({}, three.properties)
  end)

  it("are settled by tag, and up to one", function()
    for i = 1, 5 do b:send(fake.deliver(1, "tag", i, "x")) end
    assert.equal(5, channel:unsettled())
    assert.is_true((channel:settle(2, "ack")))
    assert.same({ nil, "settled" }, { channel:settle(2, "ack") })
    assert.same({ nil, "unknown_tag" }, { channel:settle(9, "ack") })
    assert.is_true((channel:settle_upto(4, "ack")))
    assert.is_true(channel:flush_acks())
    assert.equal(1, channel:unsettled())
    assert.is_true((channel:settle_upto(0, "nack", true)))
    assert.equal(0, channel:unsettled())
    fails("'ack' or 'nack' expected", channel.settle_upto, channel, 1, "reject")
    fails("'ack', 'nack' or 'reject' expected", channel.settle, channel, 1, "eat")
    fails("out of range", channel.settle, channel, -1, "ack")
  end)

  it("come before a cancel, with their queue", function()
    b:send(fake.deliver(1, "tag", 1, "x"), fake.method(1, 60, 30, short "tag" .. u8(1)))
    assert.same({ { "deliver", owner, queue }, { "cancel", owner, "tag", queue } }, b:take())
    assert.equal("x", queue:pop().body)
    local again = b:consumer(channel, "tag")
    b:send(fake.deliver(1, "tag", 2, "y"))
    assert.same({ { "deliver", owner, again } }, b:take())
  end)

  it("end with cancel-ok", function()
    channel:call("basic.cancel", { consumer_tag = "tag" })
    b:send(fake.deliver(1, "tag", 1, "x"), fake.method(1, 60, 31, short "tag"))
    local events = b:take()
    assert.equal("deliver", events[1][1])
    assert.same({ "reply", owner, "basic.cancel-ok", { consumer_tag = "tag" } }, events[2])
    assert.equal("x", queue:pop().body)
  end)

  it("end with a cancel-ok that comes late", function()
    channel:call("basic.cancel", { consumer_tag = "tag" })
    channel:call("basic.qos", { prefetch_count = 5 })
    b:send(fake.method(1, 60, 11), fake.deliver(1, "tag", 1, "x"), fake.method(1, 60, 31, short "tag"))
    local events = b:take()
    assert.same({ "reply", owner, "basic.qos-ok", {} }, events[1])
    assert.same({ "deliver", owner, queue }, events[2])
    assert.same({ "reply", owner, "basic.cancel-ok", { consumer_tag = "tag" } }, events[3])
    channel:call("basic.cancel", { consumer_tag = "none" })
    channel:close(200, "bye")
    b:send(fake.method(1, 20, 41))
    assert.same({ "reply", owner, "channel.close-ok", {} }, b:one())
    assert.is_true(b.engine:is_open())
  end)

  it("go to the successor when cancels have crossed", function()
    channel:call("basic.cancel", { consumer_tag = "tag" })
    b:send(fake.method(1, 60, 30, short "tag" .. u8(1)))
    assert.same({ "cancel", owner, "tag", queue }, b:one())
    local again = assert(channel:consume { queue = "q", consumer_tag = "tag" })
    b:send(fake.method(1, 60, 31, short "tag"), fake.method(1, 60, 21, short "tag"))
    local events = b:take()
    assert.same({ "basic.cancel-ok", "basic.consume-ok" }, { events[1][3], events[2][3] })
    b:send(fake.deliver(1, "tag", 1, "x"))
    assert.same({ "deliver", owner, again }, b:one())
    assert.equal("x", again:pop().body)
    fails("'tag' is in use", channel.consume, channel, { queue = "q", consumer_tag = "tag" })
  end)

  it("leave their tag to others after a cancel without an answer", function()
    assert.is_true(channel:call("basic.cancel", { consumer_tag = "tag", nowait = true }))
    local again = assert(channel:consume { queue = "q", consumer_tag = "tag" })
    b:sent()
    b:send(fake.deliver(1, "tag", 1, "late"))
    assert.equal("60.120", b:sent()[1].id)
    b:send(fake.method(1, 60, 31, short "tag"), fake.method(1, 60, 21, short "tag"))
    assert.equal("basic.consume-ok", b:one()[3])
    b:send(fake.deliver(1, "tag", 2, "mine"))
    assert.same({ "deliver", owner, again }, b:one())
    assert.equal("mine", again:pop().body)
    assert.equal(0, queue:count())
  end)

  it("can be acked again after a rollback", function()
    channel:call "tx.select"
    b:send(fake.method(1, 90, 11), fake.deliver(1, "tag", 1, "x"))
    local m = queue:pop()
    assert.is_boolean((core.ack(m)))
    assert.same({ nil, "settled" }, { core.ack(m) })
    channel:call "tx.rollback"
    b:send(fake.method(1, 90, 31))
    assert.equal(1, channel:unsettled())
    b:sent()
    assert.is_boolean((core.ack(m)))
    assert.equal(u64(1) .. u8(0), b:sent()[1].args)
    channel:call "tx.commit"
    b:send(fake.method(1, 90, 21))
    assert.same({ nil, "settled" }, { core.ack(m) })
  end)

  it("are closed, not settled, when a recover took them back", function()
    b:send(fake.deliver(1, "tag", 1, "x"), fake.deliver(1, "tag", 2, "y"))
    local one, two = queue:pop(), queue:pop()
    channel:call("basic.recover", { requeue = true })
    assert.same({ nil, "closed" }, { core.ack(one) })
    b:send(fake.method(1, 60, 111))
    assert.same({ nil, "closed" }, { core.ack(one) })
    assert.same({ nil, "closed" }, { core.settle(two, "nack", true) })
    assert.same({ nil, "closed" }, { channel:settle(2, "ack") })
  end)

  it("know their own queue among many", function()
    local queues, frames = { queue }, {}
    for i = 2, 20 do queues[i] = b:consumer(channel, "tag" .. i) end
    for i = 1, 400 do
      local n = (i * 7) % 20 + 1
      frames[i] = fake.deliver(1, n == 1 and "tag" or "tag" .. n, i, tostring(n))
    end
    b:send(table.concat(frames))
    assert.equal(20, #b:take())
    for n = 1, 20 do
      assert.equal(20, queues[n]:count())
      for _ = 1, 20 do assert.equal(tostring(n), queues[n]:pop().body) end
    end
  end)

  it("go back when they are discarded", function()
    b:send(fake.deliver(1, "tag", 1, "x"))
    queue:discard()
    assert.equal(0, queue:count())
    assert.equal("60.120", b:sent()[1].id)
    b:send(fake.deliver(1, "tag", 2, "y"))
    assert.equal("60.120", b:sent()[1].id)
    assert.equal(0, queue:count())
  end)

  it("refuse a consumer tag in use, and consume again after a refusal", function()
    fails("'tag' is in use", channel.consume, channel, { queue = "q", consumer_tag = "tag" })
    assert.equal("", b.engine:drain(0))
  end)

  it("are kept readable by a message alone", function()
    b:send(fake.deliver(1, "tag", 1, "x", { properties = u16(0x8000) .. short "type" }))
    local m = queue:pop()
    b, channel, owner, queue = nil, nil, nil, nil
    collectgarbage()
    collectgarbage()
    assert.equal("x", m.body)
    assert.equal("type", m.properties.content_type)
    assert.equal("table", type(m.channel))
    assert.is_boolean((core.ack(m)))
  end)
end)

describe("a no-ack consumer", function()
  local b, channel, queue
  before_each(function()
    b = fake.new():open()
    channel = b:channel()
    queue = b:consumer(channel, "tag", { no_ack = true })
  end)

  it("has nothing to settle", function()
    b:send(fake.deliver(1, "tag", 1, "x"))
    assert.same({ nil, "unknown_tag" }, { core.ack(queue:pop()) })
  end)

  -- Sends deliveries until the engine takes no more; returns the bytes that are left of the last one.
  local tag = 0
  local function fill(size)
    local body = ("x"):rep(size)
    for _ = 1, 100000 do
      tag = tag + 1
      local frame = fake.deliver(1, "tag", tag, body)
      local left = b:send(frame)
      if left > 0 then return frame:sub(-left) end
    end
    error "the engine takes whatever comes"
  end

  before_each(function() tag = 1 end)

  it("stops the input when too much waits", function()
    local rest = fill(100)
    local most = queue:count()
    assert.equal(4096, most)
    assert.equal(#rest, b:send(rest))
    for _ = 1, most - 2048 do queue:pop() end
    assert.equal(#rest, b:send(rest))
    queue:pop()
    assert.equal(0, b:send(rest))
    assert.equal(2048, queue:count())
  end)

  it("stops it at a number of bytes", function()
    local rest = fill(1000000)
    assert.equal(17, queue:count())
    b.engine:admit()
    assert.equal(0, b:send(rest))
    assert.equal(18, queue:count())
    rest = fill(10)
    queue:discard()
    assert.equal(0, b:send(rest))
    assert.equal(0, queue:count())
  end)

  it("can always be cancelled", function()
    local rest = fill(1000000)
    channel:call("basic.cancel", { consumer_tag = "tag" })
    b:take()
    assert.equal(0, b:send(rest, fake.method(1, 60, 31, short "tag")))
    local events = b:take()
    assert.equal("basic.cancel-ok", events[#events][3])
    assert.equal(18, queue:count())
  end)
end)

describe("a consumer whose broker ignores the prefetch", function()
  it("is waited for when it has more than twice what was asked for", function()
    local b = fake.new():open()
    local channel = b:channel()
    local queue = assert(channel:consume({ queue = "q", consumer_tag = "tag" }, 100))
    b:send(fake.method(1, 60, 21, fake.short "tag"))
    local tag, left = 0, 0
    local function deliver() tag = tag + 1 return fake.deliver(1, "tag", tag, "") end
    while left == 0 and tag < 1000 do left = b:send(deliver()) end
    assert.equal(264, queue:count())
    assert.is_true(left > 0)
    while queue:count() > 131 do queue:pop() end
    assert.equal(0, b:send(deliver()))
    assert.has_error(function() channel:consume({ queue = "q", consumer_tag = "other" }, 65536) end)
    assert.has_error(function() channel:consume({ queue = "q", consumer_tag = "other" }, "1") end)
  end)

  it("is waited for when it has more than any prefetch allows", function()
    local b = fake.new():open()
    local channel = b:channel()
    local queue = b:consumer(channel, "tag")
    local rest
    for at = 1, 70000, 50 do
      local frames = {}
      for i = 0, 49 do frames[i + 1] = fake.deliver(1, "tag", at + i, "") end
      local all = table.concat(frames)
      local left = b:send(all)
      if left > 0 then
        rest = all:sub(-left)
        break
      end
    end
    assert.truthy(rest)
    assert.is_true(queue:count() >= 65535 and queue:count() < 66500)
    assert.equal(#rest, b:send(rest))
    while queue:count() > 32767 do queue:pop() end
    assert.equal(#rest, b:send(rest))
    queue:pop()
    assert.equal(0, b:send(rest))
  end)
end)

describe("two no-ack consumers", function()
  it("are both waited for", function()
    local b = fake.new():open()
    local channel = b:channel()
    local queues = {
      one = b:consumer(channel, "one", { no_ack = true }),
      two = b:consumer(channel, "two", { no_ack = true }),
    }
    local tag = 0
    local function frames(name, n)
      local list = {}
      for i = 1, n do
        tag = tag + 1
        list[i] = fake.deliver(1, name, tag, "")
      end
      return table.concat(list)
    end
    for _ = 1, 80 do assert.equal(0, b:send(frames("one", 51), frames("two", 51))) end
    -- both fill up within one read
    local bytes = frames("one", 20) .. frames("two", 20)
    assert.equal(#bytes, b.engine:feed(bytes, 0))
    b:pump()
    assert.same({ 4100, 4100 }, { queues.one:count(), queues.two:count() })
    local more = frames("one", 1)
    assert.equal(#more, b:send(more))
    while queues.two:pop() do end
    assert.equal(#more, b:send(more))
    while queues.one:count() > 2048 do queues.one:pop() end
    assert.equal(#more, b:send(more))
    queues.one:pop()
    assert.equal(0, b:send(more))
    assert.equal(2048, queues.one:count())
  end)
end)

describe("forward", function()
  local b, channel, queue
  local raw = u16(0xE100) .. short "text/plain" .. short "gzip"
    .. core.encode_table { a = core.types.int8(1), b = "two", ["moonrabbit-seq"] = 9, list = { 1, { x = core.null } } }
    .. short "60000"

  before_each(function()
    b = fake.new():open()
    channel = b:channel()
    queue = b:consumer(channel, "tag")
  end)

  local tag = 0
  before_each(function() tag = 0 end)

  local function receive(body, properties)
    tag = tag + 1
    b:send(fake.deliver(1, "tag", tag, body, { properties = properties }))
    b:take()
    return queue:pop()
  end

  local function props_sent() return b:sent()[2].payload:sub(13) end

  it("is lossless", function()
    local plain = u16(0xE100) .. short "text/plain" .. short "gzip"
      .. core.encode_table { a = core.types.float(1), list = { 1, { x = core.null } } } .. short "60000"
    local m = receive("body", plain)
    assert.is_true((channel:forward(m, "e", "k", false)))
    local sent = b:sent()
    assert.equal(u16(0) .. short "e" .. short "k" .. u8(0), sent[1].args)
    assert.equal(plain, sent[2].payload:sub(13))
    assert.equal("body", sent[3].payload)
    local large = ("x"):rep(10000)
    channel:forward(receive(large, plain), "e", "k", false)
    assert.equal(large, b:sent()[3].payload)
  end)

  it("sets and removes headers and properties", function()
    local m = receive("body", raw)
    channel:forward(m, "", "k", false, { b = "new", c = 5 }, { "a" }, { "expiration", "content_type" })
    local out = props_sent()
    assert.equal(u16(0x6000) .. short "gzip", out:sub(1, 7))
    local headers = core.decode_table(out:sub(8))
    assert.same({ b = "new", c = 5, list = { 1, { x = core.null } } }, headers)
    channel:forward(m, "", "k", false, nil, { "a", "b", "list" }, { "headers" })
    assert.equal(u16(0xC100) .. short "text/plain" .. short "gzip" .. short "60000", props_sent())
  end)

  it("refuses wrong arguments", function()
    local m = receive("body", raw)
    fails("unknown property 'expires'", channel.forward, channel, m, "", "k", false, nil, nil, { "expires" })
    fails("an array of strings expected", channel.forward, channel, m, "", "k", false, nil, { 1 })
    fails("set.x: a function", channel.forward, channel, m, "", "k", false, { x = print })
    fails("longer than 255", channel.forward, channel, m, ("e"):rep(256), "k")
    fails("moonrabbit.message expected", channel.forward, channel, "m", "", "k")
  end)
end)

describe("collected objects", function()
  local function one_of_five(n)
    local b = fake.new():open()
    local channel = b:channel(true)
    local queue = b:consumer(channel, "tag")
    local c = channel:publish "x"
    b:send(fake.deliver(1, "tag", 1, "x"))
    return (select(n, b, channel, queue, c, queue:pop()))
  end

  it("close their channel, and anything may go first", function()
    for i = 1, 20 do
      local kept = one_of_five(i % 5 + 1)
      collectgarbage()
      collectgarbage()
      assert.truthy(kept)
    end
    collectgarbage()
  end)

  it("may be used by finalizers", function()
    local seen = 0
    do
      local b = fake.new():open()
      local channel = b:channel(true)
      local queue = b:consumer(channel, "tag")
      local c = channel:publish "x"
      b:send(fake.deliver(1, "tag", 1, "x", { properties = u16(0x2000) .. core.encode_table { a = 1 } }))
      local m = queue:pop()
      guard(function()
        pcall(function()
          seen = seen + 1
          core.acked(c)
          core.ack(m)
          assert(m.body == "x" and m.headers.a == 1)
          channel:publish("y", { headers = { b = 2 } })
          b.engine:pump()
        end)
      end)
    end
    collectgarbage()
    collectgarbage()
    assert.equal(1, seen)
  end)

  -- Leaves the collector stopped amid thousands of finalizers that each call fn.
  local function amid_finalizers(fn)
    local begun, armed = false, false
    collectgarbage()
    collectgarbage "stop"
    for _ = 1, 5000 do
      guard(function()
        begun = true
        if armed then fn() end
      end)
    end
    repeat collectgarbage("step", 0) until begun
    collectgarbage "stop"
    armed = true
  end

  -- Runs fn with a collector that has something to do at each allocation.
  local function collecting(fn)
    collectgarbage "restart"
    local debt = _VERSION == "Lua 5.1" and ("z"):rep(1000000)
    fn(debt)
    collectgarbage "stop"
  end

  -- The generational collector, which lua5.4 starts with, calls all finalizers at once; LuaJIT's compiler, which runs
  -- behind some calls of C, makes objects too.
  local has_modes, mode, compiler = _VERSION == "Lua 5.4", nil, rawget(_G, "jit")
  before_each(function()
    mode = has_modes and collectgarbage "incremental"
    if compiler then compiler.off() end
  end)
  after_each(function()
    if has_modes then collectgarbage(mode) end
    if compiler then compiler.on() end
    collectgarbage "restart"
  end)

  it("may tick while an event is looked at", function()
    local b = fake.new():open()
    local channel = b:channel()
    local queue = b:consumer(channel, "tag")
    local now, pumping, ticks, kept = 0, false, 0, {}
    for i = 1, 5 do
      local body = ("z"):rep(100000 + i)
      amid_finalizers(function()
        if not pumping then return end
        ticks = ticks + 1
        b.engine:tick(now)
        if #kept < 10 then kept[#kept + 1] = ("y"):rep(110000 + 10000 * #kept + i) end
      end)
      local frames = fake.deliver(1, "tag", i, body)
      while #frames > 0 do
        local taken = b.engine:feed(frames, now)
        frames = frames:sub(taken + 1)
        if #frames > 0 then b.engine:pump() end
      end
      now = now + 100
      collecting(function()
        pumping = true
        b.engine:pump()
        pumping = false
      end)
      kept = {}
      assert.is_true(queue:pop().body == body)
    end
    assert.is_true(ticks > 0)
  end)

  it("may cancel the consumer that is delivered to", function()
    local b = fake.new():open()
    local channel = b:channel()
    b:consumer(channel, "tag")
    local frames, pumping, cancelled, event = {}, false, false, nil
    for i = 1, 200 do frames[i] = fake.deliver(1, "tag", i, "x") end
    frames = table.concat(frames)
    amid_finalizers(function()
      if cancelled or not pumping then return end
      cancelled = true
      channel:call("basic.cancel", { consumer_tag = "tag", nowait = true })
    end)
    assert.equal(#frames, b.engine:feed(frames, 0))
    collecting(function()
      pumping = true
      event = b.engine:pump()
      pumping = false
    end)
    assert.is_true(cancelled)
    assert.equal("deliver", event)
    assert.is_true(b.engine:is_open())
  end)

  -- A channel whose window is as full as can be before it grows: `publish` is called next, with the collector at work,
  -- and `meanwhile(limit)` by finalizers during that call.
  local function while_it_grows(power, channel, publish, meanwhile)
    local limit, publishing = 2 ^ power, false
    while channel:unconfirmed() < limit do publish() end
    amid_finalizers(function()
      if publishing then meanwhile(limit) end
    end)
    collecting(function()
      publishing = true
      publish()
      publishing = false
    end)
  end

  it("may publish while the window grows", function()
    local b = fake.new():open()
    local channel = b:channel(true)
    local route = core.route({ routing_key = "k", message_id = "me-000000000000" }, true)
    local confirmations, within, inner = {}, 0, false
    local function note(confirmation)
      local _, seq = core.outcome(confirmation)
      confirmations[seq] = confirmation
    end
    -- What is published again needs no memory but for its place.
    local held = channel:hold(1)
    local function publish_again()
      note((channel:publish_route(route, "x", 1, held)))
      held = channel:hold(1)
    end
    for power = 6, 14 do
      local most = power == 6 and 100 or 6 -- so many that the window grows once more meanwhile
      while_it_grows(power, channel, publish_again, function()
        if inner or most == 0 then return end
        inner, most, within = true, most - 1, within + 1
        note((channel:publish "x"))
        inner = false
      end)
      b:sent()
    end
    assert.is_true(within > 0)
    local last = channel:unconfirmed()
    b:send(fake.nack(1, last, true))
    local failed = b:take()
    assert.equal(last, #failed)
    for seq, event in ipairs(failed) do
      assert.same({ "failed", seq, "nacked" }, { event[1], event[3], event[4] })
      assert.equal(confirmations[seq], event[5])
    end
  end)

  -- What throws there (memory) throws before anything is sent.
  it("run before a publish is sent, not between that and its being noted", function()
    local b = fake.new():open()
    local channel = b:channel(true)
    local held = channel:hold(1)
    local route = core.route({ routing_key = "k", message_id = "me-000000000000" }, true)
    local ways = {
      function() channel:publish "x" end,
      function() channel:publish_route(route, "x", 1) end,
      function() channel:publish_route(route, "x", 1, held) end,
    }
    local met, late = 0, 0
    for power = 6, 14 do
      while_it_grows(power, channel, ways[power % #ways + 1], function(limit)
        met = met + 1
        if channel:unconfirmed() > limit then late = late + 1 end
      end)
      b:sent()
    end
    assert.is_true(met > 0)
    assert.equal(0, late)
  end)

  it("leave a connection usable under an eager collector", function()
    local b = fake.new():open()
    local channel = b:channel(true)
    local queue = b:consumer(channel, "tag")
    collectgarbage("setpause", 0)
    for i = 1, 200 do
      channel:publish("x", { headers = { i = i, t = { 1, 2 } } })
      b:send(fake.deliver(1, "tag", i, "x", { properties = u16(0x2000) .. core.encode_table { i = i } }))
      assert.equal(i, queue:pop().headers.i)
    end
    collectgarbage("setpause", 200)
    assert.equal(200, channel:unconfirmed())
  end)
end)
