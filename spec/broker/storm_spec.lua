-- A broker that follows a script: errors that end the connection, recoveries that are cut half-way, and hundreds of
-- losses in a row.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local scripted = require "support.scripted"
local fake = require "support.fake_broker"
local native = require "moonrabbit.runtime.native"
local ok, eventually = broker.ok, broker.eventually

describe("a connection that is lost again and again", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local other, conn, seen

  -- The name behind a reserved short, of exchange.declare and queue.declare.
  local function name_of(frame) return frame.args:sub(4, 3 + frame.args:byte(3)) end

  before_each(function()
    other = scripted.start()
    other.answers["40.10"] = function(frame) return fake.method(frame.channel, 40, 11) end
    other.answers["50.10"] = function(frame)
      return fake.method(frame.channel, 50, 11, fake.short(name_of(frame)) .. fake.u32(0) .. fake.u32(0))
    end
    other.answers["50.20"] = function(frame) return fake.method(frame.channel, 50, 21) end
    other.answers["60.30"] = function(frame)
      return fake.method(frame.channel, 60, 31, frame.args:sub(1, 1 + frame.args:byte(1)))
    end
    seen = { errors = {}, recovered = 0, delays = {} }
  end)
  after_each(broker.close_all)

  local function connect(reconnect)
    conn = broker.connect { uri = "amqp://127.0.0.1/", runtime = other.runtime, log = function() end,
      reconnect = reconnect or { first = 0.001, max = 0.002 } }
    conn:on("recovered", function() seen.recovered = seen.recovered + 1 end)
    conn:on("recovering", function(_, _, delay) table.insert(seen.delays, delay) end)
    conn:on("recovery_error", function(entity, err) table.insert(seen.errors, { entity, err }) end)
  end

  it("leaves out what draws an error that ends the connection, and nothing else", function()
    connect()
    local ch = ok(conn:channel())
    for _, name in ipairs { "good", "bad", "fine" } do ok(ch:exchange_declare(name)) end
    ok(ch:queue_declare "queue")
    ok(ch:queue_bind("queue", "good"))
    local declared = {}
    other.answers["40.10"] = function(frame)
      declared[#declared + 1] = name_of(frame)
      if name_of(frame) == "bad" then
        return fake.method(0, 10, 50, fake.u16(540) .. fake.short "NOT_IMPLEMENTED" .. fake.u16(40) .. fake.u16(10))
      end
      return fake.method(frame.channel, 40, 11)
    end
    other:cut()
    eventually(function() return seen.recovered == 1 end)
    assert.equal(1, #seen.errors)
    assert.equal("bad", seen.errors[1][1].name)
    assert.equal(540, seen.errors[1][2].code)
    declared = {}
    other:cut()
    eventually(function() return seen.recovered == 2 end)
    assert.same({ "good", "fine" }, declared)
    assert.is_true(ch:is_open())
  end)

  it("starts a recovery over as a whole when it is cut half-way", function()
    connect()
    local ch = ok(conn:channel { prefetch = 5 })
    for i = 1, 20 do ok(ch:queue_declare("q" .. i)) end
    local consumer = ok(ch:consume "q1")
    local count, consumed = 0, 0
    local declare = other.answers["50.10"]
    other.answers["50.10"] = function(frame)
      count = count + 1
      if count == 10 then
        other:cut()
        return ""
      end
      return declare(frame)
    end
    other.answers["60.20"] = function(frame)
      consumed = consumed + 1
      if consumed == 1 then
        other:cut()
        return ""
      end
      return fake.method(frame.channel, 60, 21, fake.short(consumer.tag))
    end
    other:cut()
    eventually(function() return seen.recovered == 1 end)
    assert.truthy(count >= 10 + 20 + 20, count)
    assert.equal(2, consumed)
    assert.is_nil(consumer._down)
    assert.is_true(ch:is_open())
    assert.same({}, seen.errors)
  end)

  it("asks for consumers again as they were: tags, arguments, flags, in their order", function()
    connect()
    local asked = {}
    local consume = other.answers["60.20"]
    other.answers["60.20"] = function(frame)
      asked[#asked + 1] = frame.args
      local queue = frame.args:byte(3)
      local tag = frame.args:sub(5 + queue, 4 + queue + frame.args:byte(4 + queue))
      return (consume and consume(frame)) or fake.method(frame.channel, 60, 21, fake.short(tag))
    end
    local ch = ok(conn:channel { prefetch = 10 })
    ok(ch:consume("q", { tag = "first", arguments = { ["x-priority"] = 3, list = { 1, "two" } } }))
    ok(ch:consume("q", { no_ack = true, exclusive = true }))
    ok(ch:consume("r", { tag = "last", arguments = { ["x-cancel-on-ha-failover"] = true } }))
    other:cut()
    eventually(function() return seen.recovered == 1 end)
    assert.equal(6, #asked)
    for i = 1, 3 do assert.is_true(asked[i] == asked[i + 3], "consumer " .. i) end
  end)

  it("sends no ack of an earlier connection, or of a channel that was closed", function()
    connect()
    local ch = ok(conn:channel { prefetch = 10 })
    local consumer = ok(ch:consume("q", { tag = "c" }))
    local function settled()
      local list = {}
      for _, id in ipairs(other.heard) do
        if id == "60.80" or id == "60.90" or id == "60.120" then list[#list + 1] = id end
      end
      return list
    end
    -- Three deliveries to the consumer, on whatever channel it has now.
    local function deliver()
      local messages = {}
      for tag = 1, 3 do other:say(fake.deliver(ch._core:id(), consumer.tag, tag, "m", { routing_key = "q" })) end
      for tag = 1, 3 do messages[tag] = ok(consumer:receive(5)) end
      return messages
    end
    local function refused(messages)
      for i, how in ipairs { "ack", "nack", "reject" } do
        local done, err = messages[i][how](messages[i])
        assert.is_nil(done)
        assert.equal("closed", err.kind)
      end
      ok(conn:flush(5))
      assert.same({}, settled())
    end
    local old = deliver()
    other:cut()
    eventually(function() return seen.recovered == 1 end)
    refused(old)
    local younger = deliver() -- the same tags
    refused(old)
    local back
    conn:on("consumer_recovered", function() back = true end)
    other:say(fake.method(ch._core:id(), 20, 40, fake.u16(406) .. fake.short "PRECONDITION_FAILED" .. fake.u16(0)
      .. fake.u16(0)))
    eventually(function() return back end)
    refused(younger)
    local newest = deliver()
    refused(younger)
    for _, message in ipairs(newest) do assert.is_true(message:ack()) end
    ok(conn:flush(5))
    assert.truthy(#settled() > 0)
    for _, id in ipairs(settled()) do assert.equal("60.80", id) end
  end)

  it("passes over what the broker sends of a channel that it has closed, another close too", function()
    connect()
    local ch = ok(conn:channel { prefetch = 10 })
    local consumer = ok(ch:consume("q", { tag = "c" }))
    local old, lost, back = ch._core:id(), 0, 0
    ch:on("lost", function() lost = lost + 1 end)
    conn:on("consumer_recovered", function() back = back + 1 end)
    local close = fake.method(old, 20, 40, fake.u16(406) .. fake.short "PRECONDITION_FAILED" .. fake.u16(0)
      .. fake.u16(0))
    other:say(close .. close)
    eventually(function() return back == 1 end)
    other:say(close .. fake.deliver(old, "c", 1, "stray", { routing_key = "q" }))
    other:say(fake.deliver(ch._core:id(), consumer.tag, 1, "m", { routing_key = "q" }))
    assert.equal("m", ok(consumer:receive(5)).body)
    assert.are_not.equal(old, ch._core:id())
    assert.same({ 1, 1, "open", 0 }, { lost, back, (conn:state()), seen.recovered })
    local answers = 0
    for _, id in ipairs(other.heard) do
      if id == "20.41" then answers = answers + 1 end
    end
    assert.equal(1, answers)
  end)

  -- RabbitMQ 3.10 refuses everything for a quorum queue on a channel that was opened before its leader was elected.
  it("leaves a channel that is refused everything while others are served on it", function()
    connect()
    local channels, count, published = 0, 0, { good = 0, bad = 0 }
    other.answers["20.10"] = function(frame)
      channels, count = channels + 1, 0
      return fake.method(frame.channel, 20, 11, fake.long "")
    end
    other.answers["60.40"] = function(frame)
      local peer, key = other, frame.args:match "^..%z.(%a+)"
      count, published[key] = count + 1, published[key] + 1
      local confirm = key == "bad" and channels == 1 and fake.nack or fake.ack
      local answer = confirm(frame.channel, count)
      native.spawn(function() -- so much later that something is under way at any time
        native.sleep(0.03)
        peer:say(answer)
      end)
      return ""
    end
    local p = ok(conn:publisher { routing_key = "good", retry = { first = 0.02, factor = 1, attempts = math.huge } })
    local bad = ok(p:send_async("x", { routing_key = "bad" }))
    local sent, stop = 0, false
    moonrabbit.spawn(function()
      while not stop do
        sent = sent + 1
        ok(p:send_async "x")
        moonrabbit.sleep(0.002)
      end
    end)
    finally(function() stop = true end)
    eventually(function() return bad:outcome() == "acked" end, 10)
    stop = true
    assert.equal(2, channels)
    ok(p:wait(5))
    assert.equal(sent, published.good)
    assert.truthy(published.bad >= 4)
    assert.equal(0, seen.recovered)
  end)

  it("leaves such a channel with something on it that is never settled, before a message is given up", function()
    connect()
    local channels, count, stuck = 0, 0, 0
    other.answers["20.10"] = function(frame)
      channels, count = channels + 1, 0
      return fake.method(frame.channel, 20, 11, fake.long "")
    end
    other.answers["60.40"] = function(frame)
      count = count + 1
      if frame.args:match "^..%z.(%a+)" == "stuck" then
        stuck = stuck + 1
        return channels == 2 and fake.ack(frame.channel, count) or ""
      end
      return (channels == 2 and fake.ack or fake.nack)(frame.channel, count)
    end
    local p = ok(conn:publisher { retry = { first = 0.02, factor = 1, attempts = 3 } })
    local first = ok(p:send_async("x", { routing_key = "stuck" }))
    local bad = ok(p:send_async("x", { routing_key = "bad" }))
    eventually(function() return first:outcome() == "acked" and bad:outcome() == "acked" end, 20)
    assert.same({ 2, 2 }, { channels, stuck })
    assert.equal(0, p:unconfirmed())
    assert.equal(0, seen.recovered)
  end)

  it("meets a broker that accepts and drops with growing gaps", function()
    connect { first = 0.001, factor = 2, max = 0.05, jitter = 0 }
    local open, opened = other.runtime.open, nil
    function other.runtime.open(...)
      opened = native.now()
      return open(...)
    end
    for i = 1, 8 do
      local n, cut = seen.recovered, native.now()
      other:cut()
      eventually(function() return seen.recovered > n end)
      assert.equal(i, #seen.delays)
      assert.truthy(opened - cut >= seen.delays[i], "it came back before its time")
    end
    assert.equal(0.001, seen.delays[1])
    for i = 2, 8 do assert.equal(math.min(0.05, seen.delays[i - 1] * 2), seen.delays[i]) end
  end)

  -- The fewest of three looks: this process may still have the other end of a pipe to `ls` while that counts.
  local function descriptors()
    local fewest = math.huge
    for _ = 1, 3 do
      local pipe = io.popen "ls /proc/$PPID/fd | wc -l"
      fewest = math.min(fewest, tonumber(pipe:read "*a"))
      pipe:close()
    end
    return fewest
  end

  local function size(t)
    local n = 0
    for _ in pairs(t) do n = n + 1 end
    return n
  end

  it("keeps nothing of hundreds of losses", function()
    connect { first = 0, max = 0 }
    local ch = ok(conn:channel { confirm = true, prefetch = 10 })
    ok(ch:queue_declare "q")
    ok(ch:queue_bind("q", "amq.direct", "q"))
    local consumer = ok(ch:consume "q")
    local handled = ok(conn:consume("q", function() end))
    other.answers["60.40"] = false
    local function lose(times)
      for _ = 1, times do
        local n = seen.recovered
        ok(ch:publish_async("x", { routing_key = "q" }))
        other:cut()
        eventually(function() return seen.recovered > n end)
        seen.delays = {}
      end
      ch:wait_for_confirms(0)
      collectgarbage() collectgarbage()
      return collectgarbage "count"
    end
    local before, open = lose(100), descriptors()
    local after = lose(300)
    assert.truthy(after - before < 200, ("%.0f KiB more"):format(after - before))
    assert.equal(open, descriptors())
    assert.equal(2, size(conn._channels))
    assert.equal(2, size(conn._session.channels))
    assert.equal(1, size(ch._receivers))
    assert.equal(1, size(conn._record.queues))
    assert.equal(1, size(conn._record.bindings))
    for _, empty in ipairs { ch._waiters._of, ch._failures, conn._repairs.items } do assert.equal(0, size(empty)) end
    assert.equal(0, ch:unconfirmed())
    assert.is_nil(consumer._later)
    assert.is_nil(handled:reason())
  end)

  it("keeps no descriptor of a broker that drops who comes", function()
    local proxy = require "support.proxy"
    local line = proxy.start(broker.parsed().host, broker.parsed().port)
    conn = broker.connect { uri = broker.uri { host = "127.0.0.1", port = line.port }, log = function() end,
      reconnect = { first = 0, max = 0 } }
    local attempts = 0
    conn:on("recovering", function() attempts = attempts + 1 end)
    line.held = true
    line:cut()
    eventually(function() return attempts > 50 end)
    local open = descriptors()
    eventually(function() return attempts > 350 end, 20)
    assert.truthy(math.abs(descriptors() - open) <= 6)
    local started = native.now()
    ok(conn:close())
    assert.truthy(native.now() - started < 10) -- the timeout is 15 s
    line:stop()
    moonrabbit.sleep(0)
  end)
end)
