-- What comes between the broker's answer and the task that waits for it, while a connection comes back or restores
-- what was lost: against a broker that follows a script.
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local fake = require "support.fake_broker"
local scripted = require "support.scripted"

local short, u8, u16, u32 = fake.short, fake.u8, fake.u16, fake.u32

describe("a connection that comes back", function()
  local other, conn

  before_each(function() other = scripted.start() end)
  after_each(function()
    if conn then conn:close(1) end
    conn = nil
  end)

  local function connect(opts)
    opts = opts or {}
    if not opts.endpoints and not opts.sites then opts.uri = "amqp://guest:guest@127.0.0.1/" end
    opts.runtime, opts.log = other.runtime, function() end
    opts.reconnect = opts.reconnect or { first = 0.01, max = 0.05 }
    conn = assert(moonrabbit.connect(opts))
    return conn
  end

  local function eventually(fn) scripted.eventually(fn, 20) end

  local function times(id) return other:times(id) end

  local function heard_again(id)
    local before = times(id)
    return function() return times(id) > before end
  end

  local function close_connection() return fake.method(0, 10, 50, u16(320) .. short "CONNECTION_FORCED" .. u32(0)) end

  local function close_channel(id)
    return fake.method(id, 20, 40, u16(406) .. short "PRECONDITION_FAILED" .. u16(60) .. u16(20))
  end

  local function opened(id) return fake.method(id, 20, 11, fake.long "") end

  -- The answer to basic.consume (its tag is "c"), with what comes right behind it for the n-th time.
  local function consume_answers(behind)
    local n = 0
    other.answers["60.20"] = function(frame)
      n = n + 1
      return fake.method(frame.channel, 60, 21, short "c") .. (behind[n] and behind[n](frame.channel) or "")
    end
    other.answers["50.10"] = scripted.declared
  end

  local function a_message(id) return fake.deliver(id, "c", 1, "x") end

  -- Its consumer is lost once more right behind the answer of the broker that it consumes again, and then is not.
  local function consumes_after(behind)
    connect()
    local ch = assert(conn:channel())
    consume_answers { function() return "" end, behind, a_message }
    local consumer = assert(ch:consume("q", { prefetch = 5, tag = "c" }))
    local message
    moonrabbit.run(function()
      other:cut()
      message = consumer:receive(5)
    end)
    assert.truthy(message)
    assert.equal("x", message.body)
    assert.is_nil(consumer._down)
  end

  it("restores a consumer that is cancelled right behind the answer to it", function()
    consumes_after(function(id) return fake.method(id, 60, 30, short "c" .. u8(1)) end)
  end)

  it("restores a consumer whose channel is closed right behind the answer to it", function()
    consumes_after(close_channel)
  end)

  it("restores a consumer whose connection ends right behind the answer to it", function()
    consumes_after(close_connection)
  end)

  -- Two consumers come back: the broker is slow to answer the first, and `second(n, frame)` is its n-th answer to the
  -- other. Answers both, and a function that says what the broker held.
  local function two_come_back(second)
    connect()
    local consumers, held, starts = {}, nil, 0
    for i = 1, 2 do
      consumers[i] = assert(assert(conn:channel()):consume("q" .. i, { prefetch = 5, tag = "c" }))
    end
    other.answers["50.10"] = scripted.declared
    other.answers["60.20"] = function(frame)
      starts = starts + 1
      local answer = fake.method(frame.channel, 60, 21, short "c")
      if starts > 1 then return second(starts - 1, answer, frame.channel) end
      held = answer
      return ""
    end
    return consumers, function() other:say(held) end
  end

  it("restores a consumer that is lost again while others are waited for", function()
    local asked = 0
    local consumers, go_on = two_come_back(function(n, answer, id)
      asked = n
      return answer .. (n == 1 and fake.method(id, 60, 30, short "c" .. u8(1)) or a_message(id))
    end)
    local message
    moonrabbit.run(function()
      other:cut()
      eventually(function() return asked == 1 and next(conn._repairs.items) end)
      go_on()
      message = consumers[2]:receive(5)
    end)
    assert.truthy(message)
    assert.is_nil(consumers[1]._down)
  end)

  it("restores a consumer that is asked for again before what it asked first has failed", function()
    local asked, last = 0, nil
    local consumers, go_on = two_come_back(function(n, answer, id)
      asked = n
      if n == 1 then return close_channel(id) end
      last = answer .. a_message(id)
      return ""
    end)
    local message
    moonrabbit.run(function()
      other:cut()
      eventually(function() return last end)
      go_on()
      eventually(function() return consumers[2].channel._careful end) -- the task has come to it
      other:say(last)
      message = consumers[2]:receive(5)
      eventually(function() return not consumers[2]._down and not next(conn._repairs.items) end)
    end)
    assert.truthy(message)
    assert.equal(2, asked)
  end)

  -- ---- Where it goes --------------------------------------------------------------------------------

  local function ports_asked_for()
    local ports, open = {}, other.runtime.open
    other.runtime.open = function(endpoint)
      ports[#ports + 1] = endpoint.port
      return open(endpoint)
    end
    return ports
  end

  it("goes to the standby site when that has its turn, however far apart attempts have become", function()
    local ports = ports_asked_for()
    connect { reconnect = { first = 60, max = 60 }, sites = { after = 0.05,
      primary = { uri = "amqp://127.0.0.1:5001" }, standby = { uri = "amqp://127.0.0.1:5002" } } }
    moonrabbit.run(function()
      other:cut()
      eventually(function() return ports[2] end)
      assert(conn:wait_open(5))
    end)
    assert.same({ 5001, 5002 }, { ports[1], ports[2] }) -- then it looks at the primary
    assert.equal("standby", conn:site())
  end)

  it("looks at the primary site with the secret that the broker was told last", function()
    local ports, open, logins, back = {}, other.runtime.open, {}, false
    other.runtime.open = function(endpoint)
      ports[#ports + 1] = endpoint.port
      if endpoint.port == 5001 and not back then return nil, "refused", "nobody listens", true end
      return open(endpoint)
    end
    local tune = fake.method(0, 10, 30, u16(0) .. u32(131072) .. u16(60))
    other.answers["10.11"] = function(frame)
      logins[#logins + 1] = ports[#ports] .. " " .. (frame.args:match "%z(%w+)\5en_US$" or "?")
      return tune
    end
    other.answers["10.70"] = function() return fake.method(0, 10, 71) end
    connect { password = "first", sites = { probe = 0.01, primary = { uri = "amqp://127.0.0.1:5001" },
      standby = { uri = "amqp://127.0.0.1:5002" } } }
    assert(conn:update_secret "rotated")
    back = true
    moonrabbit.run(function()
      eventually(function() return #logins > 1 end)
    end)
    assert.equal("5002 first", logins[1])
    assert.equal("5001 rotated", logins[#logins])
  end)

  local function comes_back_at_5002(ports)
    moonrabbit.run(function()
      other:cut()
      eventually(function() return ports[3] end)
      assert(conn:wait_open(5))
    end)
    assert.same({ 5001, 5001, 5002 }, ports)
  end

  it("goes on at another endpoint when one takes it and then falls silent", function()
    local ports = ports_asked_for()
    other.answers["50.10"] = scripted.declared
    connect { endpoints = { "amqp://127.0.0.1:5001", "amqp://127.0.0.1:5002" }, timeout = 0.05 }
    assert(assert(conn:channel()):queue_declare("q"))
    other.answers["50.10"] = function(frame) return ports[#ports] == 5002 and scripted.declared(frame) or "" end
    comes_back_at_5002(ports)
  end)

  it("goes on at another endpoint when one takes it and does not open its channels", function()
    local ports = ports_asked_for()
    connect { endpoints = { "amqp://127.0.0.1:5001", "amqp://127.0.0.1:5002" }, timeout = 0.05 }
    assert(conn:publisher { exchange = "", routing_key = "q" })
    other.answers["20.10"] = function(frame) return ports[#ports] == 5002 and opened(frame.channel) or "" end
    other.answers["85.10"] = function(frame)
      return ports[#ports] == 5002 and fake.method(frame.channel, 85, 11) or ""
    end
    comes_back_at_5002(ports)
  end)

  it("survives a password function that throws", function()
    local asked = 0
    connect { password = function()
      asked = asked + 1
      if asked == 2 then error("the vault is away", 0) end
      return "guest"
    end }
    local why
    conn:on("recovering", function(err, attempt) why = attempt == 2 and err or why end)
    moonrabbit.run(function()
      other:cut()
      eventually(function() return why end)
      assert(conn:wait_open(5))
    end)
    assert.equal("auth", why.kind)
    assert.matches("the vault is away", why.message)
  end)

  -- ---- What is opened -------------------------------------------------------------------------------

  it("opens no channel that ended right behind the answer", function()
    connect()
    other.answers["20.10"] = function(frame)
      other.answers["20.10"] = nil
      return opened(frame.channel) .. close_connection()
    end
    local ch, err = conn:channel()
    assert.is_nil(ch)
    assert.equal("closed", err.kind)
    assert.equal(320, err.code)
    assert(conn:wait_open(5))
  end)

  it("makes no publisher whose channel ended right behind the answer", function()
    connect()
    other.answers["85.10"] = function(frame)
      other.answers["85.10"] = nil
      return fake.method(frame.channel, 85, 11) .. close_connection()
    end
    local p, err = conn:publisher { routing_key = "q" }
    assert.is_nil(p)
    assert.equal(320, err.code)
    assert(conn:wait_open(5))
    assert(conn:publisher { routing_key = "q" })
  end)

  it("starts no consumer that ended right behind the answer", function()
    connect()
    consume_answers { close_connection }
    local consumer, err = conn:consume("q", { tag = "c", prefetch = 5 }, function() end)
    assert.is_nil(consumer)
    assert.equal(320, err.code)
    assert(conn:wait_open(5))
    assert.is_nil(next(conn._channels))
  end)

  -- ---- What was closed meanwhile --------------------------------------------------------------------

  local function a_lost_publisher(opts)
    connect(opts)
    local p = assert(conn:publisher { routing_key = "q" })
    other:say(close_channel(p.channel._core:id()))
    eventually(function() return not p.channel:is_open() end)
    return p
  end

  local function nothing_to_repair() return not conn._repairs.running end

  it("does not open a channel again that was closed before its turn", function()
    moonrabbit.run(function()
      local p = a_lost_publisher()
      local before = times "20.10"
      assert(p:close())
      eventually(nothing_to_repair)
      assert.equal(before, times "20.10")
      assert.is_nil(next(conn._session.channels))
    end)
  end)

  -- The first channel that is opened again is answered, the others not until `fn` was called.
  local function meanwhile(fn)
    local late, first = {}, nil
    local function hold(answer)
      return function(frame)
        first = first or frame.channel
        if frame.channel == first then return answer(frame.channel) end
        late[#late + 1] = answer(frame.channel)
        return ""
      end
    end
    other.answers["20.10"] = hold(opened)
    other.answers["85.10"] = hold(function(id) return fake.method(id, 85, 11) end)
    eventually(function() return late[1] and other.out == "" end) -- the first is answered
    fn()
    other.answers["20.10"], other.answers["85.10"] = nil, nil
    other:say(table.concat(late))
  end

  local function assert_open(channel)
    assert.equal(channel, next(conn._session.channels))
    assert.is_nil(next(conn._session.channels, channel))
  end

  it("closes the channels that were closed while the broker was asked to open them again", function()
    connect { reconnect = { first = 0 } } -- all of them in one turn
    moonrabbit.run(function()
      local publishers, closes = {}, {}
      for i = 1, 3 do
        publishers[i] = assert(conn:publisher { routing_key = "q" })
        closes[i] = close_channel(publishers[i].channel._core:id())
      end
      local closed = times "20.40"
      other:say(table.concat(closes))
      meanwhile(function()
        assert(publishers[1]:close())
        assert(publishers[2]:close())
      end)
      eventually(function() return times "20.40" == closed + 2 end)
      eventually(function() return publishers[3].channel:is_open() end)
      assert_open(publishers[3].channel)
    end)
  end)

  it("closes the channels that were closed while it came back", function()
    connect()
    moonrabbit.run(function()
      local channels = {}
      for i = 1, 3 do channels[i] = assert(conn:channel()) end
      local closed = times "20.40"
      other:cut()
      meanwhile(function()
        assert(channels[1]:close())
        assert(channels[2]:close())
      end)
      eventually(function() return times "20.40" == closed + 2 end)
      eventually(function() return channels[3]:is_open() end)
      assert_open(channels[3])
    end)
  end)

  it("does not wait for channels that were closed while it came back, and was lost again", function()
    connect()
    moonrabbit.run(function()
      local channels = {}
      for i = 1, 2 do channels[i] = assert(conn:channel()) end
      other.answers["20.10"] = function() return "" end
      local asked = heard_again "20.10"
      other:cut()
      eventually(asked)
      for i = 1, 2 do assert(channels[i]:close()) end
      other.answers["20.10"] = nil
      other:cut()
      eventually(function() return conn:is_open() end)
      assert.is_nil(next(conn._session.channels))
    end)
  end)

  it("declares nothing when it was closed during an attempt", function()
    connect()
    other.answers["50.10"] = scripted.declared
    assert(assert(conn:channel()):queue_declare "q")
    moonrabbit.run(function()
      other.answers["10.40"] = false
      local again = heard_again "10.40"
      other:cut()
      eventually(again)
      local declares, goodbye = times "50.10", heard_again "10.50"
      assert(conn:close())
      other:say(fake.method(0, 10, 41, short ""))
      eventually(goodbye)
      assert.equal(declares, times "50.10")
    end)
  end)

  it("leaves no task behind that waits for the time of a repair", function()
    connect { reconnect = { first = 60, max = 60 } }
    assert(assert(conn:channel()):consume("q", { prefetch = 5, tag = "c" }))
    moonrabbit.run(function()
      other:say(fake.method(1, 60, 30, short "c" .. u8(1)))
      eventually(function() return next(conn._repairs.items) end)
      assert.is_true(conn._repairs.running)
      conn:close(1)
      eventually(function() return not conn._repairs.running end)
    end)
  end)

  -- ---- What throws ----------------------------------------------------------------------------------

  it("begins anew when restoring throws behind its being open", function()
    connect()
    consume_answers { function() return "" end, function() return "" end, a_message, a_message }
    local consumers, thrown = {}, false
    for i = 1, 2 do
      consumers[i] = assert(assert(conn:channel()):consume("q" .. i, { tag = "c", prefetch = 5 }))
      consumers[i].channel._resume = function(channel)
        if not thrown then
          thrown = true
          error "not enough memory"
        end
        channel._resume = nil
        channel:_resume()
      end
    end
    moonrabbit.run(function()
      other:cut()
      for i = 1, 2 do assert.truthy(consumers[i]:receive(5)) end
    end)
    assert.is_true(thrown)
    assert.is_true(conn:is_open())
  end)

  it("comes back though telling a publisher of its loss threw, and tells the others", function()
    connect()
    local publishers, thrown = {}, false
    for i = 1, 3 do
      publishers[i] = assert(conn:publisher { routing_key = "q" })
      assert(publishers[i]:send_async "x")
      publishers[i]._keeper.lost = function(keeper, err)
        keeper.lost = nil
        if thrown then return keeper:lost(err) end
        thrown = true
        error "not enough memory"
      end
    end
    moonrabbit.run(function()
      eventually(function() return times "60.40" == 3 end)
      other:cut()
      eventually(function() return times "60.40" == 5 end) -- the others have sent theirs again
    end)
    assert.is_true(thrown)
    for i = 1, 3 do assert.is_true(publishers[i].channel:is_open()) end
  end)

  -- ---- Tasks that are cancelled ---------------------------------------------------------------------

  local function cancelled_at(id, fn)
    other.answers[id] = false
    local again = heard_again(id)
    moonrabbit.run(function()
      local task = moonrabbit.spawn(fn)
      eventually(again)
      native.cancel(task)
      eventually(function() return conn._session.awaiting == 0 end)
    end)
  end

  it("closes the channel of a consumer whose task is cancelled while it starts", function()
    connect()
    local closed = times "20.40"
    cancelled_at("60.20", function() conn:consume("q", { prefetch = 5 }) end)
    moonrabbit.run(function() eventually(function() return times "20.40" == closed + 1 end) end)
    assert.is_nil(next(conn._channels))
  end)

  it("closes the channel of a consumer whose arguments cannot be sent", function()
    connect()
    local wrong = { prefetch = 5, arguments = { x = print } }
    assert.error_matches(function() conn:consume("q", wrong) end, "cannot be sent")
    assert.is_nil(next(conn._channels))
  end)

  it("closes the outbox of a publisher whose task is cancelled while it is made", function()
    connect()
    local closes = 0
    local Outbox = require "moonrabbit.publisher.outbox"
    local open = Outbox.open
    Outbox.open = function(...)
      local outbox = assert(open(...))
      local close = outbox.close
      function outbox:close()
        closes = closes + 1
        return close(self)
      end
      return outbox
    end
    cancelled_at("85.10", function() conn:publisher { routing_key = "q", outbox = "memory" } end)
    Outbox.open = open
    assert.equal(1, closes)
  end)

  -- ---- Room, and names ------------------------------------------------------------------------------

  it("hands on what wakes a publish that then lacks something else", function()
    connect()
    local full, free = assert(conn:channel { confirm = true, window = 1 }), assert(conn:channel { confirm = true })
    local sent
    moonrabbit.run(function()
      local session = conn._session
      assert(full:publish_async("first", { routing_key = "q" }))
      eventually(function() return times "60.40" == 1 end)
      other:say(fake.method(0, 10, 60, short "low on memory"))
      eventually(function() return conn:blocked() end)
      for i, ch in ipairs { full, free } do
        moonrabbit.spawn(function()
          local confirmation = ch:publish_async("x", { routing_key = "q", timeout = 30 })
          if ch == free then sent = confirmation end
        end)
        eventually(function() return session.awaiting == i end)
      end
      other.transport.try_flush = function() return nil, "again" end -- no write gives room
      other.transport.flush = function() native.sleep(1) end
      other:say(fake.method(0, 10, 61))
      eventually(function() return sent end)
      other.transport.try_flush, other.transport.flush = nil, nil
    end)
  end)

  it("does not leave an exclusive queue that the broker named while it is there", function()
    connect()
    other.answers["50.10"] = scripted.declared
    local ch = assert(conn:channel())
    local name = assert(ch:queue_declare("", { exclusive = true })).queue
    local consumer = assert(ch:consume(name, { tag = "c", prefetch = 5 }))
    consume_answers { a_message }
    other.answers["50.10"] = function(frame)
      local asked = frame.args:byte(3) > 0
      return fake.method(frame.channel, 50, 11, short(asked and name or "amq.gen-another") .. u32(0) .. u32(0))
    end
    moonrabbit.run(function()
      other:say(fake.method(ch._core:id(), 60, 30, short "c" .. u8(1)))
      assert.truthy(consumer:receive(5))
    end)
    assert.equal(name, consumer.queue)
  end)

  it("has an exclusive queue named again when a repair finds its name taken", function()
    connect()
    other.answers["50.10"] = scripted.declared
    assert(assert(conn:channel()):queue_declare("", { exclusive = true }))
    local asked, renamed = {}, nil
    conn:on("queue_renamed", function(_, new) renamed = new end)
    local function refusal(id, code) return fake.method(id, 20, 40, u16(code) .. short "no" .. u16(50) .. u16(10)) end
    other.answers["50.10"] = function(frame)
      asked[#asked + 1] = frame.args:byte(3) > 0 and "is it there" or "a new one"
      if #asked == 1 then return refusal(frame.channel, 403) end
      if asked[#asked] == "is it there" then return refusal(frame.channel, 405) end
      return fake.method(frame.channel, 50, 11, short "amq.gen-another" .. u32(0) .. u32(0))
    end
    moonrabbit.run(function()
      other:cut()
      eventually(function() return renamed end)
    end)
    assert.equal("amq.gen-another", renamed)
    assert.same({ "a new one", "is it there", "a new one" }, asked)
  end)
end)
