-- Whether a broker that is there is left alone, and one that is not is noticed.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local proxy = require "support.proxy"
local native = require "moonrabbit.runtime.native"
local scripted = require "support.scripted"
local ok = broker.ok
local unpack = table.unpack or unpack -- luacheck: ignore 143 113

-- These connections end when they are suspected.
local function once(opts)
  opts.reconnect = false
  return opts
end

describe("health", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local through

  before_each(function() through = proxy.start(broker.parsed().host, broker.parsed().port) end)
  after_each(function()
    broker.close_all()
    through:stop()
  end)

  -- A connection through the proxy, and what happens to it.
  local function connect_through(health, heartbeat)
    local conn = broker.connect(once { uri = broker.uri { host = "127.0.0.1", port = through.port }, health = health,
      heartbeat = heartbeat or 1, timeout = 3 })
    local seen = {}
    conn:on("suspect", function(strategy, details) seen.strategy, seen.details = strategy, details end)
    conn:on("closed", function(err) seen.err, seen.at = err, native.now() end)
    return conn, seen
  end

  -- What is tried: each stays calm when a busy broker says nothing for half a second, and is done long before the core,
  -- which waits for two intervals.
  local strategies = {
    { strategy = "fixed", multiple = 1.25 },
    { strategy = "adaptive", probe = 0.1, least = 1 },
    { strategy = "consecutive", probe = 0.3, misses = 3 },
  }

  -- Both sides are there, the line is not, and no RST tells.
  local function half_open(health)
    local _, seen = connect_through(health, 2)
    moonrabbit.sleep(0.05)
    local gone = native.now()
    through.silent = true
    broker.eventually(function() return seen.err and seen.strategy end, 20)
    assert.equal("timeout", seen.err.kind)
    assert.is_true(seen.err.temporary)
    return seen, seen.at - gone
  end

  it("a half-open line is noticed without the option: two heartbeat intervals", function()
    local seen, took = half_open(nil)
    assert.truthy(took < 6, took) -- two, and what a busy machine takes
    assert.equal("fixed", seen.err.strategy)
    assert.equal("fixed", seen.strategy)
    assert.matches("two heartbeat intervals", tostring(seen.err))
  end)

  for _, health in ipairs(strategies) do
    it("a half-open line is noticed by '" .. health.strategy .. "', which is named", function()
      local seen, took = half_open(health)
      assert.truthy(took < 4, took)
      assert.equal(health.strategy, seen.strategy)
      assert.equal(health.strategy, seen.err.strategy)
      assert.matches("%(" .. health.strategy .. "%)", tostring(seen.err))
      assert.equal(seen.details, seen.err.message)
    end)
  end

  -- Nobody reads what this side writes, either: no question can be asked, and the writer waits for the socket.
  for _, health in ipairs { false, unpack(strategies) } do
    local name = health and health.strategy or "two heartbeat intervals"
    it("a half-open line with a full socket is noticed by '" .. name .. "'", function()
      -- Where nothing can be asked consecutive begins to count after one interval, and the core ends it after two.
      local heartbeat = health and health.strategy == "consecutive" and 5 or 2
      local conn, seen = connect_through(health, heartbeat)
      local ch = ok(conn:channel())
      through.stuck = true
      local body, timeout = ("x"):rep(131072), { routing_key = "nowhere", timeout = 0 }
      broker.eventually(function()
        for _ = 1, 20 do ch:publish(body, timeout) end
        moonrabbit.sleep(0.02)
        return conn._session.engine:pending() > 0 and conn._session.flushing
      end, 20, "the socket is full")
      broker.eventually(function() return seen.err and seen.strategy end, 20)
      assert.equal("timeout", seen.err.kind)
      assert.is_true(seen.err.temporary)
      -- Where nothing can be asked adaptive has no more to go by than the core, until it knows some gaps.
      local expected = { [false] = "fixed", fixed = "fixed", consecutive = "consecutive" }
      local strategy = health and health.strategy
      if strategy ~= "adaptive" then assert.equal(expected[strategy], seen.err.strategy) end
    end)
  end

  it("a suspicion ends the session, and the connection comes back at once", function()
    local conn = broker.connect { uri = broker.uri { host = "127.0.0.1", port = through.port }, heartbeat = 60,
      health = { strategy = "consecutive", probe = 0.3, misses = 3 }, reconnect = { first = 0.01 }, timeout = 3,
      log = function() end }
    local ch = ok(conn:channel { confirm = true, prefetch = 10 })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    local consumer = ok(ch:consume(queue))
    local why, back
    conn:on("suspect", function() through.silent = false end)
    conn:on("recovering", function(err) why = why or err end)
    conn:on("recovered", function() back = true end)
    through.silent = true
    broker.eventually(function() return back end, 20)
    assert.same({ "timeout", "consecutive" }, { why.kind, why.strategy })
    ok(ch:publish("x", { routing_key = consumer.queue }))
    assert.equal("x", ok(consumer:receive(5)).body)
  end)

  it("the broker answers probes, and a quiet connection lives on", function()
    local conn, seen = connect_through({ strategy = "adaptive", probe = 0.05, least = 2 }, 4)
    local detector = conn._session.detector
    broker.eventually(function() return detector.judge.trips.count >= 10 end)
    assert.is_nil(seen.err)
    assert.is_true(conn:is_open())
    assert.is_true((detector.judge.trips:moments()) > 0)
  end)

  it("nothing is suspected while a handler waits, and heartbeats go on both ways", function()
    local conn, seen = connect_through({ strategy = "consecutive", probe = 0.3, misses = 4 })
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    local ended
    ok(ch:consume(queue, function(msg)
      moonrabbit.sleep(3.2) -- more than two intervals, and than all misses
      ended = msg:ack()
    end))
    ok(ch:publish("x", { routing_key = queue }))
    broker.eventually(function() return ended end)
    assert.is_nil(seen.err)
    assert.is_true(conn:is_open())
  end)

  it("the broker suspects nobody whose handler waits and who has nothing else to say", function()
    local conn, seen = connect_through(nil)
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    local ended
    ok(ch:consume(queue, function(msg)
      moonrabbit.sleep(5) -- the broker hangs up after two intervals without a sign of life, or three
      ended = msg:ack()
    end))
    ok(ch:publish("x", { routing_key = queue }))
    broker.eventually(function() return ended ~= nil or seen.err end, 10)
    assert.is_nil(seen.err)
    assert.is_true(ended)
  end)

  it("nothing is suspected when the event loop stood still", function()
    local conn, seen = connect_through({ strategy = "adaptive", probe = 0.1, least = 2 }, 2)
    conn._session.log = function() end -- it warns of that
    broker.eventually(function() return conn._session.detector.judge.trips.count >= 6 end)
    for _ = 1, 2 do
      os.execute "sleep 2.3"
      moonrabbit.sleep(0.15)
    end
    moonrabbit.sleep(0.3)
    assert.is_nil(seen.err)
    assert.is_true(conn:is_open())
  end)

  it("nothing is suspected while reading is paused", function()
    local conn, seen = connect_through({ strategy = "consecutive", probe = 0.3, misses = 3 })
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ch:queue_declare("", { exclusive = true })).queue
    for i = 1, 6000 do
      ch:publish_async("x", { routing_key = queue, persistent = false })
      if i % 500 == 0 then ok(ch:wait_for_confirms()) end
    end
    local consumer = ok(ch:consume(queue, { no_ack = true }))
    local session = conn._session
    broker.eventually(function() return session.paused end, 10, "reading is paused")
    moonrabbit.sleep(1.8)
    assert.is_nil(seen.err)
    for _ = 1, 6000 do ok(consumer:receive(5)) end
    moonrabbit.sleep(0.3)
    assert.is_nil(seen.err)
    assert.is_true(conn:is_open())
  end)

  it("a probe channel that the broker refuses is done without", function()
    local peer = scripted.start()
    local fake = require "support.fake_broker"
    peer.answers["20.10"] = function(frame)
      return fake.method(frame.channel, 20, 40, fake.u16(504) .. fake.short "no" .. fake.u16(20) .. fake.u16(10))
    end
    local conn = ok(moonrabbit.connect(once { runtime = peer.runtime, heartbeat = 10,
      health = { strategy = "consecutive", probe = 0.02, misses = 2 } }))
    local function heard(id)
      for _, one in ipairs(peer.heard) do
        if one == id then return true end
      end
    end
    broker.eventually(function() return heard "20.41" end)
    moonrabbit.sleep(0.15)
    assert.is_true(conn:is_open())
    assert.is_nil(heard "60.10")
    conn:close(1)
  end)

  it("no probe is sent to a broker that has blocked publishing", function()
    local peer = scripted.start()
    local fake = require "support.fake_broker"
    local conn = ok(moonrabbit.connect(once { runtime = peer.runtime, heartbeat = 10,
      health = { strategy = "consecutive", probe = 0.02, misses = 3 } }))
    local function probes()
      local n = 0
      for _, one in ipairs(peer.heard) do
        if one == "60.10" then n = n + 1 end
      end
      return n
    end
    broker.eventually(function() return probes() >= 2 end)
    peer:say(fake.method(0, 10, 60, fake.short "low on memory"))
    broker.eventually(function() return conn:blocked() end)
    local before = probes()
    moonrabbit.sleep(0.2)
    assert.equal(before, probes())
    assert.is_true(conn:is_open())
    peer:say(fake.method(0, 10, 61))
    broker.eventually(function() return probes() > before end)
    peer.answers["60.10"] = false
    broker.eventually(function() return not conn:is_open() end)
    assert.equal("consecutive", select(2, conn:state()).strategy)
  end)

  it("is off unless it is asked for", function()
    local conn = connect_through(nil)
    assert.is_nil(conn._session.detector)
    conn = connect_through(false)
    assert.is_nil(conn._session.detector)
  end)
end)
