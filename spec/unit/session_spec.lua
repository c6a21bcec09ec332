-- What a connection owes its user when its broker is at its worst, against one that follows a script.
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local fake = require "support.fake_broker"
local scripted = require "support.scripted"

local short, u16, u32 = fake.short, fake.u16, fake.u32

describe("a connection", function()
  local other, conn

  before_each(function() other = scripted.start() end)
  after_each(function()
    if conn then conn:close(1) end
    conn = nil
  end)

  local function connect(opts)
    opts = opts or {}
    opts.uri, opts.runtime, opts.log = "amqp://guest:first-secret@127.0.0.1/", other.runtime, function() end
    conn = assert(moonrabbit.connect(opts))
    return conn
  end

  local function eventually(fn) scripted.eventually(fn, 30) end

  local function close(code, text) return fake.method(0, 10, 50, u16(code) .. short(text) .. u32(0)) end

  it("says why the broker hung up, although a write failed before that was read", function()
    connect { reconnect = false }
    local ch = assert(conn:channel())
    other.transport.flush = function() return nil, "closed", "broken pipe" end
    other.transport.try_flush = other.transport.flush
    local err
    moonrabbit.run(function()
      moonrabbit.spawn(function() err = select(2, ch:qos(1, { timeout = 5 })) end)
      moonrabbit.sleep(0.05)
      assert(not err)
      other:say(close(320, "CONNECTION_FORCED - maintenance"))
      eventually(function() return err end)
    end)
    assert.equal(320, err.code)
    assert.matches("maintenance", err.message)
  end)

  it("wakes a publish when the broker is no longer blocked", function()
    connect()
    local ch = assert(conn:channel { confirm = true })
    local result, published
    other.answers["60.40"] = function(frame)
      published = true
      return fake.ack(frame.channel, 1)
    end
    moonrabbit.run(function()
      other:say(fake.method(0, 10, 60, short "low on memory"))
      eventually(function() return conn:blocked() end)
      moonrabbit.spawn(function() result = { ch:publish("x", { routing_key = "q", timeout = 30 }) } end)
      moonrabbit.sleep(0.02)
      assert(not published)
      other:say(fake.method(0, 10, 61))
      eventually(function() return result end)
    end)
    assert.is_true(result[1])
  end)

  it("wakes a publish whose channel may publish again, whoever else waits", function()
    connect()
    local channels, sent, result = {}, {}, nil
    other.answers["60.40"] = function(frame)
      sent[frame.channel] = (sent[frame.channel] or 0) + 1
      return fake.ack(frame.channel, sent[frame.channel])
    end
    for i = 1, 5 do channels[i] = assert(conn:channel { confirm = true }) end
    moonrabbit.run(function()
      for i = 1, 5 do other:say(fake.method(i, 20, 20, "\0")) end
      eventually(function() return not channels[5]:publish_async("x", { timeout = 0 }) end)
      for i = 1, 4 do
        moonrabbit.spawn(function() channels[i]:publish("x", { routing_key = "q", timeout = 30 }) end)
      end
      moonrabbit.spawn(function() result = { channels[5]:publish("x", { routing_key = "q", timeout = 30 }) } end)
      moonrabbit.sleep(0.02)
      other:say(fake.method(5, 20, 20, "\1"))
      eventually(function() return result end)
    end)
    assert.is_true(result[1])
  end)

  it("wakes the task whose publish came back, and keeps nothing of it", function()
    connect()
    local ch = assert(conn:channel { confirm = true })
    local results = {}
    other.answers["60.40"] = function(frame) -- the first comes back, the second is refused, the third is acked
      local n = #results + 1
      if n == 2 then return fake.nack(frame.channel, n) end
      if n == 3 then return fake.ack(frame.channel, n) end
      local number = require "moonrabbit.core".encode_table { ["moonrabbit-seq"] = moonrabbit.types.int64(n) }
      return fake.returned(frame.channel, "x", { properties = u16(0x2000) .. number }) .. fake.ack(frame.channel, n)
    end
    moonrabbit.run(function()
      for i = 1, 3 do
        moonrabbit.spawn(function() results[i] = { ch:publish("x", { routing_key = "q", timeout = 30 }) } end)
        eventually(function() return results[i] end)
      end
    end)
    assert.equal("unroutable", results[1][2].kind)
    assert.equal(312, results[1][2].code)
    assert.equal("nacked", results[2][2].kind)
    assert.is_true(results[3][1])
    assert.is_nil(next(ch._returns))
  end)

  it("lets what is published in a batch leave together", function()
    connect()
    local ch = assert(conn:channel())
    local writes, flush = 0, other.transport.try_flush
    other.transport.try_flush = function(...)
      writes = writes + 1
      return flush(...)
    end
    local function publish()
      for _ = 1, 5 do assert(ch:publish_async(("x"):rep(100000), { routing_key = "q" })) end
      return writes
    end
    assert.is_true(publish() > 0)
    assert(conn:flush())
    writes = 0
    assert(conn:batch(function() assert.equal(0, publish()) end))
    assert.equal(0, conn._session.engine:pending())
  end)

  it("logs in again with the secret that it told the broker last", function()
    local logins = {}
    other.answers["10.11"] = function(frame)
      logins[#logins + 1] = frame.args:match "%zguest%z([%w-]+)"
      return fake.method(0, 10, 30, u16(0) .. u32(131072) .. u16(60))
    end
    other.answers["10.70"] = function() return fake.method(0, 10, 71) end
    connect { reconnect = { first = 0.01 } }
    assert(conn:update_secret "second-secret")
    moonrabbit.run(function()
      other:cut()
      eventually(function() return #logins == 2 and conn:is_open() end)
    end)
    assert.same({ "first-secret", "second-secret" }, { logins[1]:sub(1, 12), logins[2]:sub(1, 13) })
  end)

  it("reads no more than so much past a consumer that takes nothing, while a call waits", function()
    connect()
    local ch = assert(conn:channel())
    assert(ch:consume("q", { no_ack = true, tag = "c" }))
    local size, given, most = 1000000, 0, 150 -- one body is more than one read
    other.answers["60.10"] = false
    other.flood = function()
      if given == most then return nil end
      given = given + 1
      return fake.deliver(1, "c", given, ("x"):rep(size))
    end
    other.more:broadcast()
    moonrabbit.run(function()
      local err
      moonrabbit.spawn(function() err = select(2, ch:qos(1, { timeout = 60 })) end)
      eventually(function() return given > 60 end) -- 16 MiB for the consumer, 64 MiB for the call
      local before, turns = given, 0
      while turns < 100 and given < most do -- it reads no more
        moonrabbit.sleep(0.005)
        turns = given == before and turns + 1 or 0
        before = given
      end
      assert.is_true(given < 100, given)
      assert(not err)
      other.flood = nil
      other:cut()
      eventually(function() return err end)
      assert.equal("closed", err.kind)
    end)
  end)

  -- A thousand messages, each with a millisecond of work that does not yield: how often others ran meanwhile.
  local function others_run(take)
    connect()
    local ch = assert(conn:channel())
    local frames, turns, taken = {}, 0, 0
    for i = 1, 1000 do frames[i] = fake.deliver(1, "c", i, "") end
    local function work(message)
      local done = native.now() + 0.001
      while native.now() < done do end
      message:ack()
      taken = taken + 1
    end
    moonrabbit.run(function()
      other.answers["60.20"] = function() return fake.method(1, 60, 21, short "c") .. table.concat(frames) end
      take(ch, work)
      moonrabbit.spawn(function()
        while taken < 1000 do
          turns = turns + 1
          moonrabbit.sleep(0)
        end
      end)
      eventually(function() return taken == 1000 end)
    end)
    return turns
  end

  it("lets others run while messages are taken one after the other", function()
    local turns = others_run(function(ch, work)
      local consumer = assert(ch:consume("q", { tag = "c", prefetch = 1000 }))
      moonrabbit.spawn(function()
        for _ = 1, 1000 do work(assert(consumer:receive())) end
      end)
    end)
    assert.is_true(turns >= 3, turns)
    turns = others_run(function(ch, work)
      local consumer = assert(ch:consume("q", { tag = "c", prefetch = 1000 }))
      moonrabbit.spawn(function()
        local messages = consumer:messages() -- not by `for`, through which PUC 5.1 cannot yield
        for _ = 1, 1000 do work(messages()) end
      end)
    end)
    assert.is_true(turns >= 3, turns)
  end)

  it("lets others run while handlers take messages one after the other", function()
    local turns = others_run(function(ch, work)
      assert(ch:consume("q", { tag = "c", prefetch = 1000, concurrency = 1 }, work))
    end)
    assert.is_true(turns >= 3, turns)
  end)

  -- Runs fn in a task that is cancelled once it waits for the broker.
  local function cancelled(fn)
    local session = conn._session
    local task = moonrabbit.spawn(fn)
    eventually(function() return session.awaiting > 0 end)
    native.cancel(task)
    eventually(function() return session.awaiting == 0 end)
  end

  it("waits for nothing more when a task that waits for it is cancelled", function()
    connect()
    local waits = {}
    local all = assert(conn:publisher { routing_key = "q" })
    function waits.send() all:send "x" end
    function waits.wait() all:wait() end
    local small = assert(conn:publisher { routing_key = "q", max_kept = 1 })
    assert(small:send_async "x")
    function waits.room() small:send "x" end
    local ch = assert(conn:channel { confirm = true, window = 1 })
    function waits.publish() ch:publish("x", { routing_key = "q" }) end
    function waits.window() ch:publish("x", { routing_key = "q" }) end
    function waits.confirms() ch:wait_for_confirms() end
    function waits.call() conn:call("x", { routing_key = "q" }) end
    moonrabbit.run(function()
      for _, name in ipairs { "send", "wait", "room", "publish", "window", "confirms", "call" } do
        cancelled(waits[name])
      end
    end)
    assert.is_nil(next(conn._rpc._replies.by_id))
    assert.is_nil(next(conn._rpc._replies.by_seq))
  end)

  it("hands the room that a cancelled task was woken for on to the next", function()
    connect()
    local p = assert(conn:publisher { routing_key = "q", max_kept = 1, timeout = 30 })
    local keeper = p._keeper
    assert(p:send_async "first")
    local taken
    moonrabbit.run(function()
      local one = moonrabbit.spawn(function() p:send_async "second" end)
      eventually(function() return conn._session.awaiting == 1 end)
      moonrabbit.spawn(function() taken = p:send_async "third" end)
      eventually(function() return conn._session.awaiting == 2 end)
      -- The confirm and the cancel come in the same turn.
      local confirmed = keeper._confirmed
      function keeper._confirmed(self)
        confirmed(self)
        native.cancel(one)
      end
      other:say(fake.ack(p.channel._core:id(), 1))
      eventually(function() return taken end)
    end)
  end)

  local function last_heard(id) return function() return other.heard[#other.heard] == id end end

  it("cancels a consumer that starts after the task that started it was cancelled, whatever it waited for", function()
    connect()
    local ch = assert(conn:channel())
    other.answers["60.10"], other.answers["60.20"] = false, false
    moonrabbit.run(function()
      local task = moonrabbit.spawn(function() ch:consume("q", { prefetch = 5, tag = "c" }) end)
      eventually(last_heard "60.20")
      native.cancel(task)
      eventually(function() return conn._session.awaiting == 0 end)
      other:say(fake.method(1, 60, 11) .. fake.method(1, 60, 21, short "c"))
      eventually(last_heard "60.30")
    end)
    assert.is_nil(next(ch._consumers))
  end)

  local function delivery(channel, tag, number, body)
    return fake.method(channel, 60, 60, short(tag) .. fake.u64(number) .. fake.u8(0) .. short "" .. short "q")
      .. fake.content(channel, body)
  end

  local function heard(id) return other:times(id) > 0 end

  it("wakes another one when a task is cancelled that a message has woken", function()
    connect()
    local ch = assert(conn:channel())
    local consumer = assert(ch:consume("q", { prefetch = 5, tag = "c" }))
    moonrabbit.run(function()
      local message
      local first = moonrabbit.spawn(function() consumer:receive() end)
      moonrabbit.spawn(function() message = consumer:receive() end)
      eventually(function() return consumer._receiving == 2 end)
      -- The message and the cancel come in the same turn.
      local delivered = consumer._delivered
      function consumer._delivered(self)
        delivered(self)
        native.cancel(first)
      end
      other:say(delivery(ch._core:id(), "c", 1, "x"))
      eventually(function() return message end)
      assert.equal(0, consumer._receiving)
    end)
  end)

  it("goes on with another task when a handler's is cancelled, and gives its message back", function()
    connect()
    local ch = assert(conn:channel())
    local bodies = {}
    assert(ch:consume("q", { prefetch = 5, tag = "c", concurrency = 1, error_delay = 0 }, function(message)
      bodies[#bodies + 1] = message.body
      if message.body == "1" then
        native.cancel(native.current())
        moonrabbit.sleep(0)
      end
      message:ack()
    end))
    moonrabbit.run(function()
      local id = ch._core:id()
      other:say(delivery(id, "c", 1, "1") .. delivery(id, "c", 2, "2") .. delivery(id, "c", 3, "3"))
      eventually(function() return #bodies == 3 and (heard "60.120" or heard "60.90") end)
    end)
    assert.same({ "1", "2", "3" }, bodies)
  end)

  it("tells those who wait for all of a refusal that a cancelled task has not heard of", function()
    connect()
    local ch = assert(conn:channel { confirm = true })
    local p = assert(conn:publisher { routing_key = "q", retry = { attempts = 0 } })
    local function refused(publish, channel, wait)
      local result
      moonrabbit.run(function()
        local task = moonrabbit.spawn(publish)
        eventually(function() return conn._session.awaiting == 1 end)
        native.cancel(task)
        eventually(function() return conn._session.awaiting == 0 end)
        other:say(fake.nack(channel._core:id(), 1))
        eventually(function() return channel._core:unconfirmed() == 0 end)
        result = { wait() }
      end)
      assert.is_nil(result[1])
      assert.equal("nacked", result[2].kind)
    end
    refused(function() ch:publish("x", { routing_key = "q" }) end, ch, function() return ch:wait_for_confirms(5) end)
    refused(function() p:send "x" end, p.channel, function() return p:wait(5) end)
  end)

  it("consumes again though the answer to an earlier attempt comes after all", function()
    connect { timeout = 1, reconnect = { first = 0.01, max = 0.05 } }
    local ch = assert(conn:channel())
    local consumer = assert(ch:consume("q", { prefetch = 5, tag = "c" }))
    moonrabbit.run(function()
      local late, channel = {}, nil
      other.answers["50.10"] = function(frame)
        return fake.method(frame.channel, 50, 11, short "q" .. u32(0) .. u32(0))
      end
      other.answers["60.20"] = function(frame)
        channel = frame.channel
        late[#late + 1] = fake.method(frame.channel, 60, 21, short "c")
        if #late == 1 then return "" end
        return late[#late]
      end
      -- It is told that its first attempt took too long, hears the answer, and then that it has been cancelled.
      other.answers["60.30"] = function(frame) return late[1] .. fake.method(frame.channel, 60, 31, short "c") end
      other:cut()
      eventually(function() return #late >= 2 end)
      local message
      moonrabbit.spawn(function() message = consumer:receive(10) end)
      other:say(fake.method(channel, 60, 60, short "c" .. fake.u64(1) .. fake.u8(0) .. short "" .. short "q")
        .. fake.content(channel, "x"))
      eventually(function() return message end)
    end)
    assert.is_nil(consumer:reason())
  end)
end)
