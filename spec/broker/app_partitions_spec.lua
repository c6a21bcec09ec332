-- Partitions need a plugin: pending on a broker without it.
local broker = require "support.broker"
local mr = require "moonrabbit"

local function without_plugin()
  if broker.none() then return broker.none() end
  local channel = broker.connect():channel()
  local name = broker.unique "hash"
  local ok = channel:exchange_declare(name, { type = "x-consistent-hash", auto_delete = true })
  if ok then channel:exchange_delete(name) end
  broker.close_all()
  if not ok then return "needs the plugin rabbitmq_consistent_hash_exchange" end
end

describe("partitions #app", function()
  local it = broker.it_unless(it, pending, without_plugin()) -- luacheck: ignore 431

  after_each(broker.close_all)

  it("share the keys among queues, each of which one consumer works on, in order", function()
    local base = broker.unique "parts"
    local exchange, seen = base .. ".in", {}
    local function an_app(process)
      local app = mr.app {
        name = base, log = function() end, exchanges = { [exchange] = { auto_delete = false } },
        queues = { [base] = { bind = { { exchange, "#" } } } },
        consumers = {
          { queue = base, partitions = { count = 3, by = { header = "customer" } }, concurrency = 1,
            handler = function(msg)
              local customer = msg.headers.customer
              seen[customer] = seen[customer] or { by = {}, order = {} }
              table.insert(seen[customer].order, tonumber(msg.body))
              seen[customer].by[process] = true
            end },
        },
      }
      broker.ok(app:start { consume = broker.connect(), publish = broker.connect() })
      return app
    end
    local first, second = an_app "first", an_app "second"
    local channel = broker.ok(broker.connect():channel { confirm = true })
    for i = 1, 20 do
      for c = 1, 8 do
        broker.ok(channel:publish(tostring(i),
          { exchange = exchange, routing_key = "x", headers = { customer = "c" .. c } }))
      end
    end
    broker.eventually(function()
      for c = 1, 8 do if not seen["c" .. c] or #seen["c" .. c].order < 20 then return false end end
      return true
    end)
    for _, each in pairs(seen) do
      for i = 1, 20 do assert.equal(i, each.order[i]) end
      local _, one = next(each.by)
      assert.is_true(one)
      assert.is_nil(next(each.by, next(each.by))) -- one process alone
    end
    first:stop(5)
    second:stop(5)
    for i = 1, 3 do channel:queue_delete(base .. "." .. i) end
    channel:exchange_delete(base .. ".partitions")
    channel:exchange_delete(exchange)
  end)
end)
