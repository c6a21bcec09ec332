-- An app beside a quorum queue whose leader dies, with the node that the app is connected to.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local cluster = require "support.cluster"
local management = require "moonrabbit.management"
local ok, unique = broker.ok, broker.unique

describe("an app on a cluster", function()
  if cluster.none() then pending(cluster.none()) return end

  local app, name

  after_each(function()
    app:stop(5)
    local api = management.new(cluster.management[1])
    cluster.node("restart", 1)
    for _, queue in ipairs { name, name .. ".in", name .. ".dead" } do api:delete_queue("/", queue) end
  end)

  -- RabbitMQ 3.10 refuses everything on a channel whose first publish comes while there is no leader, for as long as the
  -- node is away (docs/decisions.md): a plain channel may stay so to the end of this.
  it("publishes on when the leader of the queue that it publishes to is gone, and stays away", function()
    name = unique "leader"
    local handled, done = 0, {}
    app = moonrabbit.app {
      name = name, log = function() end,
      queues = { [name] = { type = "quorum" }, [name .. ".in"] = { type = "quorum" } },
      consumers = {
        { queue = name .. ".in", concurrency = 4, retry = moonrabbit.retry.constant { delay = 0.2, attempts = 100 },
          handler = function(msg, self)
            handled = handled + 1
            local sent, err = self:publish(msg.body, { routing_key = name, timeout = 3 })
            if sent then done[msg.body] = true end
            return sent, err
          end },
      },
    }
    ok(app:start {
      endpoints = { cluster.urls[1], cluster.urls[2], cluster.urls[3] }, reconnect = { first = 0.02, max = 0.1 },
      log = function() end,
    })
    local conn = broker.connect { uri = cluster.urls[2] }
    local publisher = ok(conn:publisher { routing_key = name .. ".in" })
    local placed, over = 0, false
    moonrabbit.spawn(function()
      while not over do
        placed = placed + 1
        publisher:send_async(tostring(placed))
        moonrabbit.sleep(0.02)
      end
    end)
    broker.eventually(function() return handled > 20 end, 20, "the first messages")
    local killed = cluster.node_in_background("kill", 1)
    broker.eventually(killed, 20, "the death of node 1")
    local seen = placed
    broker.eventually(function() return placed > seen + 100 end, 30, "messages after that")
    over = true
    ok(publisher:wait(30))
    broker.eventually(function()
      for i = 1, placed do
        if not done[tostring(i)] then return false end
      end
      return true
    end, 30, "every message sent on while node 1 is away")
    broker.close_all()
  end)
end)
