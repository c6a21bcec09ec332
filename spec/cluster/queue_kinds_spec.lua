-- Kinds of queues on three nodes, and federation and shovels between two brokers.
local moonrabbit = require "moonrabbit"
local management = require "moonrabbit.management"
local broker = require "support.broker"
local cluster = require "support.cluster"
local ok, unique = broker.ok, broker.unique
local queue = moonrabbit.queue

describe("on a cluster", function()
  if cluster.none() then pending(cluster.none()) return end

  local api = management.new(cluster.management[1])
  local node = cluster.node_name
  local doomed

  before_each(function() doomed = {} end)
  after_each(function()
    for _, each in ipairs(doomed) do each() end
    broker.close_all()
  end)

  local function declare(kind, at, name)
    local ch = ok(broker.connect { uri = cluster.urls[at or 1] }:channel { confirm = true, prefetch = 10 })
    name = name or unique "kind"
    ok(ch:queue_declare(name, kind))
    doomed[#doomed + 1] = function() api:delete_queue("/", name) end
    return name, ch
  end

  -- Waits until a queue is where fn says.
  local function where(name, fn, what)
    return broker.eventually(function()
      local found = cluster.leader(api, name)
      if found and fn(found) then return found end
      moonrabbit.sleep(0.2)
    end, 60, what)
  end

  describe("mirrored queues", function()
    local function mirror(opts)
      local policy = unique "mirror"
      opts.pattern = "^" .. policy:gsub("%-", "\\-")
      ok(api:mirror("/", policy, opts))
      doomed[#doomed + 1] = function() api:delete_policy("/", policy) end
      return policy .. ".q"
    end

    it("are on all nodes", function()
      local name, ch = declare(queue.classic(), 2, mirror { mode = "all" })
      local found = where(name, function(q) return #q.in_sync == 3 end, "three in sync")
      assert.equal(node(2), found.leader)
      assert.same({ node(1), node(2), node(3) }, found.members)
      for i = 1, 20 do ok(ch:publish("m" .. i, { routing_key = name })) end
      local msg = ok(ok(broker.connect { uri = cluster.urls[3] }:channel()):get(name))
      assert.equal("m1", msg.body)
    end)

    it("are on exactly so many, and on the nodes that are named", function()
      local name = declare(queue.classic(), 1, mirror { mode = "exactly", count = 2 })
      local found = where(name, function(q) return #q.in_sync == 2 end, "two in sync")
      assert.equal(node(1), found.leader)
      assert.equal(2, #found.members)
      name = declare(queue.classic(), 1, mirror { mode = "nodes", nodes = { node(1), node(3) } })
      found = where(name, function(q) return #q.in_sync == 2 end, "two in sync")
      assert.same({ node(1), node(3) }, found.members)
    end)

    it("that are synchronised by hand are not before that", function()
      local name, ch = declare(queue.classic(), 1)
      ok(ch:publish("old", { routing_key = name }))
      ok(api:mirror("/", name, { pattern = "^" .. name:gsub("%-", "\\-") .. "$", sync = "manual" }))
      doomed[#doomed + 1] = function() api:delete_policy("/", name) end
      local found = where(name, function(q) return #q.members == 3 end, "three members")
      assert.same({ node(1) }, found.in_sync)
      ok(api:sync_queue("/", name))
      where(name, function(q) return #q.in_sync == 3 end, "three in sync")
    end)
  end)

  it("quorum queues and streams have members and a leader", function()
    for _, kind in ipairs { queue.quorum { group_size = 3 }, queue.stream { group_size = 3 } } do
      local name = declare(kind, 2)
      local found = where(name, function(q) return #q.in_sync == 3 and q.leader end, "three members")
      assert.same({ node(1), node(2), node(3) }, found.members)
    end
    local name = declare(queue.quorum { group_size = 1 }, 3)
    assert.same({ node(3) }, where(name, function(q) return q.leader end, "a leader").members)
  end)

  describe("with another broker", function()
    local second, theirs
    setup(function()
      second = cluster.second()
      theirs = management.new(second.management)
    end)

    it("federation: what is published at one arrives at the other", function()
      local exchange, upstream = unique "federated", unique "upstream"
      -- The upstream is the cluster, the downstream the other broker.
      ok(theirs:set_federation_upstream("/", upstream, { uri = cluster.urls[1], ["ack-mode"] = "on-confirm" }))
      ok(theirs:set_policy("/", exchange, { pattern = "^" .. exchange:gsub("%-", "\\-") .. "$",
        definition = { ["federation-upstream"] = upstream }, apply_to = "exchanges" }))
      local here = ok(broker.connect { uri = second.url }:channel { prefetch = 10 })
      ok(here:exchange_declare(exchange, { type = "topic", durable = true }))
      local name = ok(here:queue_declare("", { exclusive = true })).queue
      ok(here:queue_bind(name, exchange, "order.#"))
      broker.eventually(function()
        for _, link in ipairs(ok(theirs:federation_links "/")) do
          if link.exchange == exchange and link.status == "running" then return true end
        end
        moonrabbit.sleep(0.2)
      end, 60, "the link runs")
      assert.equal(upstream, ok(theirs:federation_upstreams "/")[1].name)

      local there = ok(broker.connect { uri = cluster.urls[2] }:channel { confirm = true })
      -- The binding is made upstream by the link: until it is, a publish is unroutable there.
      broker.eventually(function()
        return (there:publish("across", { exchange = exchange, routing_key = "order.new" }))
      end, 30, "the binding is upstream")
      local msg = ok(ok(here:consume(name)):receive(30))
      assert.equal("across", msg.body)
      assert.equal("order.new", msg.routing_key)
      assert.truthy(msg.headers["x-received-from"])
      msg:ack()
      ok(theirs:delete_policy("/", exchange))
      ok(theirs:delete_federation_upstream("/", upstream))
      ok(here:exchange_delete(exchange))
      ok(there:exchange_delete(exchange))
    end)

    it("federation: an upstream that is wrong is refused, without its password", function()
      local set, err = theirs:set_federation_upstream("/", "bad", { uri = "amqp://me:sesame@host:nowhere" })
      assert.is_nil(set)
      assert.equal("http", err.kind)
      assert.not_matches("sesame", tostring(err))
    end)

    it("shovels: what is in a queue here goes to a queue there", function()
      local name, ch = declare(queue.quorum())
      ok(ch:publish("shovelled", { routing_key = name }))
      ok(theirs:set_shovel("/", name, {
        ["src-protocol"] = "amqp091", ["src-uri"] = cluster.urls[1], ["src-queue"] = name,
        ["dest-protocol"] = "amqp091", ["dest-uri"] = second.url, ["dest-queue"] = name,
        ["src-queue-args"] = { ["x-queue-type"] = "quorum" },
      }))
      local there = ok(broker.connect { uri = second.url }:channel())
      local msg = broker.eventually(function()
        local probe = ok(broker.connect { uri = second.url }:channel())
        local got = probe:get(name)
        if not got then moonrabbit.sleep(0.2) end
        return got
      end, 60, "the message is there")
      assert.equal("shovelled", msg.body)
      broker.eventually(function()
        for _, shovel in ipairs(ok(theirs:shovels "/")) do
          if shovel.name == name and shovel.state == "running" then return true end
        end
        moonrabbit.sleep(0.2)
      end, 30, "the shovel is listed")
      ok(theirs:delete_shovel("/", name))
      ok(there:queue_delete(name))
    end)
  end)
end)
