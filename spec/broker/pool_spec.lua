-- Pools.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local native = require "moonrabbit.runtime.native"
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
    assert.same({ connections = 0, channels = 0, used = 0 }, pool:stats())
    local ch = ok(pool:acquire())
    assert.is_true(ch.confirm)
    assert.same({ connections = 1, channels = 1, used = 1 }, pool:stats())
    pool:release(ch)
    assert.same({ connections = 1, channels = 1, used = 0 }, pool:stats())
    assert.equal(ch, ok(pool:acquire()))
    pool:release(ch)
    assert.has_error(function() pool:release(ch) end)
    assert.truthy(tostring(pool):find("1 connections", 1, true))
  end)

  it("is bounded, and waits within a timeout", function()
    pool = moonrabbit.pool { connect = broker.url, connections = 2, channels = 3, timeout = 0.1 }
    local list = {}
    for i = 1, 6 do list[i] = ok(pool:acquire()) end
    assert.same({ connections = 2, channels = 6, used = 6 }, pool:stats())
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
    pool = moonrabbit.pool { connect = broker.url, channels = 1, timeout = 1 }
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
      moonrabbit.sleep(0.02)
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
end)
