-- Pools.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local native = require "moonrabbit.runtime.native"
local ports = require "support.ports"
local proxy = require "support.proxy"
local scripted = require "support.scripted"
local ok = broker.ok

describe("pool", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local pool

  after_each(function()
    if pool then pool:close(5) end
    broker.close_all()
  end)

  it("lends channels and takes them back", function()
    pool = moonrabbit.pool(broker.url)
    assert.same({ connections = 0, channels = 0, used = 0, waiting = 0 }, pool:stats())
    local ch = ok(pool:acquire())
    assert.is_true(ch.confirm)
    assert.same({ connections = 1, channels = 1, used = 1, waiting = 0 }, pool:stats())
    pool:release(ch)
    assert.same({ connections = 1, channels = 1, used = 0, waiting = 0 }, pool:stats())
    assert.equal(ch, ok(pool:acquire()))
    pool:release(ch)
    assert.has_error(function() pool:release(ch) end)
    assert.truthy(tostring(pool):find("1 connections", 1, true))
  end)

  it("is bounded, and waits within a timeout", function()
    pool = moonrabbit.pool { connect = broker.url, connections = 2, channels = 3, timeout = 0.1 }
    local list = {}
    for i = 1, 6 do list[i] = ok(pool:acquire(15)) end
    assert.same({ connections = 2, channels = 6, used = 6, waiting = 0 }, pool:stats())
    local started = native.now()
    local none, err = pool:acquire()
    assert.is_nil(none)
    assert.equal("timeout", err.kind)
    assert.truthy(native.now() - started >= 0.09)
    pool:release(list[1])
    assert.equal(list[1], ok(pool:acquire()))
  end)

  it("serves many tasks", function()
    pool = moonrabbit.pool { connect = { uri = broker.url }, connections = 2, channels = 4 }
    moonrabbit.run(function()
      local done, most = 0, 0
      for i = 1, 100 do
        moonrabbit.spawn(function()
          local result = ok(pool:with(function(ch, n)
            most = math.max(most, pool:stats().used)
            assert(ch:publish("x", { exchange = "amq.fanout", mandatory = false }))
            return n
          end, i))
          assert(result == i)
          done = done + 1
        end)
      end
      broker.eventually(function() return done == 100 end, 20)
      assert.truthy(most <= 8)
    end)
    assert.equal(0, pool:stats().used)
  end)

  it("replaces what was closed, and gives nothing dirty on", function()
    pool = moonrabbit.pool { connect = broker.url, channels = 2 }
    local ch = ok(pool:acquire())
    ch:queue_declare("no-such-queue", { passive = true })
    assert.is_false(ch:is_open())
    pool:release(ch)
    local again = ok(pool:acquire())
    assert.is_true(again:is_open())
    local queue = ok(again:queue_declare("", { exclusive = true })).queue
    ok(again:consume(queue))
    pool:release(again)
    assert.is_false(again:is_open())
    local connection = ok(pool:acquire()).connection
    ok(connection:close())
    local fresh = ok(pool:acquire())
    assert.is_true(fresh:is_open())
    assert.is_true(fresh.connection ~= connection)
  end)

  it("gives the channel back when the function throws", function()
    pool = moonrabbit.pool { connect = broker.url, channels = 1, timeout = 10 }
    local good, message = pcall(pool.with, pool, function() error "inside" end)
    assert.is_false(good)
    assert.matches("inside", message)
    assert.equal(5, ok(pool:with(function() return 5 end)))
  end)

  it("returns what connecting fails of, and recovers", function()
    pool = moonrabbit.pool { connect = "amqp://127.0.0.1:1/" }
    local none, err = pool:acquire()
    assert.is_nil(none)
    assert.equal("refused", err.kind)
    none, err = pool:with(function() end)
    assert.is_nil(none)
    assert.equal("refused", err.kind)
  end)

  it("closes, and whoever waits learns it", function()
    pool = moonrabbit.pool { connect = broker.url, channels = 1 }
    moonrabbit.run(function()
      ok(pool:acquire())
      local result
      moonrabbit.spawn(function() result = { pool:acquire() } end)
      broker.eventually(function() return pool:stats().waiting == 1 end)
      assert.is_true(ok(pool:close()))
      broker.eventually(function() return result end)
      assert.is_nil(result[1])
      assert.equal("closed", result[2].kind)
    end)
    local none, err = pool:acquire()
    assert.is_nil(none)
    assert.equal("closed", err.kind)
  end)

  it("wakes those who wait for a connection that another task makes", function()
    pool = moonrabbit.pool { connect = broker.url, connections = 1, channels = 4, timeout = 10 }
    moonrabbit.run(function()
      local n = 0
      for _ = 1, 4 do
        moonrabbit.spawn(function()
          ok(pool:acquire()) -- and keeps it
          n = n + 1
        end)
      end
      broker.eventually(function() return n == 4 end, 5)
    end)
  end)

  it("serves those who wait in the order of coming, and those who come later after them", function()
    pool = moonrabbit.pool { connect = broker.url, channels = 1, timeout = 10 }
    moonrabbit.run(function()
      local ch, order = ok(pool:acquire()), {}
      for i = 1, 5 do
        moonrabbit.spawn(function()
          local mine = ok(pool:acquire())
          order[#order + 1] = i
          moonrabbit.sleep(0)
          pool:release(mine)
        end)
      end
      broker.eventually(function() return pool:stats().waiting == 5 end, 5)
      pool:release(ch)
      ch = ok(pool:acquire()) -- at the end of the line, though the channel was free a moment ago
      order[#order + 1] = "last"
      assert.same({ 1, 2, 3, 4, 5, "last" }, order)
      pool:release(ch)
    end)
  end)

  it("gives no channel to a task that was cancelled", function()
    pool = moonrabbit.pool { connect = broker.url, channels = 1, timeout = 10 }
    moonrabbit.run(function()
      local ch = ok(pool:acquire())
      local task = moonrabbit.spawn(function() pool:acquire() end)
      broker.eventually(function() return pool:stats().waiting == 1 end, 5)
      native.cancel(task)
      pool:release(ch)
      assert.equal(ch, ok(pool:acquire(5)))
      assert.equal(0, pool:stats().waiting)
      task = moonrabbit.spawn(function() pool:acquire() end)
      broker.eventually(function() return pool:stats().waiting == 1 end, 5)
      pool:release(ch) -- served, and cancelled before it runs again
      native.cancel(task)
      assert.equal(ch, ok(pool:acquire(5)))
      pool:release(ch)
    end)
  end)

  it("replaces what a lost connection takes with it, for those who wait too", function()
    pool = moonrabbit.pool { connect = { uri = broker.url, log = function() end }, connections = 1, channels = 2 }
    moonrabbit.run(function()
      local one, other = ok(pool:acquire()), ok(pool:acquire())
      local got
      moonrabbit.spawn(function() got = { pool:acquire(20) } end)
      broker.eventually(function() return pool:stats().waiting == 1 end, 5)
      one.connection._session.transport:close() -- as a network does that is gone
      broker.eventually(function() return got end, 10)
      assert.is_true(ok(got[1], got[2]):is_open())
      pool:release(one)
      pool:release(other)
      pool:release(got[1])
      assert.same({ connections = 1, channels = 1, used = 0, waiting = 0 }, pool:stats())
    end)
  end)

  it("waits through an outage, within its timeout", function()
    local to = broker.parsed()
    local port = ports.free() -- nobody takes it while the line is down
    local line = proxy.start(to.host, to.port, port)
    pool = moonrabbit.pool { connect = { uri = broker.uri { host = "127.0.0.1", port = port }, log = function() end } }
    moonrabbit.run(function()
      local ch = ok(pool:acquire())
      pool:release(ch)
      line:stop()
      broker.eventually(function() return not ch:is_open() end, 10)
      local none, err = pool:acquire(0.3)
      assert.is_nil(none)
      assert.equal("refused", err.kind)
      local got
      moonrabbit.spawn(function() got = { pool:acquire(20) } end)
      broker.eventually(function() return pool:stats().waiting == 1 end, 5)
      line = proxy.start(to.host, to.port, port)
      broker.eventually(function() return got end, 10)
      ok(got[1], got[2])
    end)
    line:stop()
  end)

  it("loses no place to a URI that is none", function()
    pool = moonrabbit.pool { connect = "amqpx://nope", timeout = 0.1 }
    for _ = 1, 2 do
      local good, message = pcall(pool.acquire, pool)
      assert.is_false(good)
      assert.matches("invalid AMQP URI", message)
    end
    assert.equal(0, #pool._members)
  end)

  it("keeps its timeout, whatever it waits for", function()
    local other = scripted.start()
    pool = moonrabbit.pool { connect = { uri = "amqp://127.0.0.1/", runtime = other.runtime, timeout = 20 } }
    local ch = ok(pool:acquire())
    assert.equal(20, ch.timeout)
    other.answers["20.10"], other.answers["85.10"] = false, false
    local started = native.now()
    local none, err = pool:acquire(0.2)
    assert.is_nil(none)
    assert.equal("timeout", err.kind)
    assert.truthy(native.now() - started < 10) -- the channel's own is 20 s
    pool:close(1)
    other = scripted.start()
    other.answers["10.40"] = false
    pool = moonrabbit.pool { connect = { endpoints = { "amqp://127.0.0.1/", "amqp://127.0.0.1:5673/" },
      connect_timeout = 4, runtime = other.runtime } }
    started = native.now()
    none, err = pool:acquire(2)
    assert.is_nil(none)
    assert.equal("timeout", err.kind)
    assert.truthy(native.now() - started < 3.9) -- that of one endpoint is 4 s
  end)

  it("closes all its connections within one timeout", function()
    local others = {}
    local runtime = setmetatable({
      open = function(...)
        others[#others + 1] = scripted.start()
        others[#others].answers["10.50"] = false
        return others[#others].runtime.open(...)
      end,
    }, { __index = native, __newindex = native })
    pool = moonrabbit.pool { connect = { uri = "amqp://127.0.0.1/", runtime = runtime }, connections = 3, channels = 1 }
    for _ = 1, 3 do ok(pool:acquire()) end
    local started = native.now()
    local closed, err = pool:close(1)
    assert.is_nil(closed)
    assert.equal("timeout", err.kind)
    assert.equal(3, #others)
    assert.truthy(native.now() - started < 2.9) -- one after the other they take 3 s
  end)

  it("gives no channel on whose qos or timeout was changed", function()
    pool = moonrabbit.pool { connect = broker.url, prefetch = 5 }
    for _, change in ipairs {
      function(ch) ok(ch:qos(7)) end,
      function(ch) ok(ch:qos(5, { global = true })) end,
      function(ch) ch.timeout = 1 end,
    } do
      local ch = ok(pool:acquire())
      change(ch)
      pool:release(ch)
      assert.is_false(ch:is_open())
    end
    local ch = ok(pool:acquire())
    pool:release(ch)
    assert.is_true(ch:is_open())
  end)
end)
