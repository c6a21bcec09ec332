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
    app = moonrabbit.app {
      name = name, log = function() end,
      queues = { [name] = { type = "quorum" }, [name .. ".in"] = {} },
      consumers = { { queue = name .. ".in", handler = function() end } },
    }
    ok(app:start {
      endpoints = { cluster.urls[1], cluster.urls[2], cluster.urls[3] }, reconnect = { first = 0.02, max = 0.1 },
      log = function() end,
    })
    local in_a_row, tries, over, last = 0, 0, false, nil
    for _ = 1, 4 do
      moonrabbit.spawn(function()
        while not over do
          local sent, err = app:publish("x", { routing_key = name, timeout = 3 })
          tries, in_a_row, last = tries + 1, sent and in_a_row + 1 or 0, err
          moonrabbit.sleep(0.01)
        end
      end)
    end
    broker.eventually(function() return in_a_row > 50 end, 20, "the first messages")
    broker.eventually(cluster.node_in_background("kill", 1), 20, "the death of node 1")
    in_a_row = 0 -- from here on only another leader can take one
    local served = pcall(broker.eventually, function() return in_a_row > 100 end, 60)
    over = true
    assert.truthy(served, tostring(last))
    broker.close_all()
  end)
end)
