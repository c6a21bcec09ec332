--- The faults, one after the other. Each:
--
-- * `name`, and `quick = true` for those of `make chaos QUICK=1`
-- * `leader`   the node that the queues are declared on, and so are led by; 1 by default
-- * `clients`  the node that publisher and consumer try first; 2 by default
-- * `via`      "nodes" (default), "links" or "balancer"
-- * `connect`  options of moonrabbit.connect beside the worker's own
-- * `inject(run)`: the fault begins when it is called; `heal(run)`: what ends it; between them `hold` seconds
-- * `kinds`    the kinds of queue; all by default
-- * `outbox`, `careless`  as in publisher.lua
-- * `loses`    the run must show losses, else the harness proves nothing
--
-- `run` has `world`, `queues`, `publisher`, `consumer` and `restart(kind, changes)`.
local world = require "chaos.world"

local function each_node(fn)
  for node = 1, world.nodes do fn(node) end
end

local function kill_and_restart(node)
  return {
    inject = function() world.kill(node) end,
    heal = function() world.restart(node) end,
  }
end

local function network_cut(health)
  return {
    via = "links", connect = { health = health }, hold = 6,
    inject = function() world.link "silent 2" end,
    heal = function() world.link "pass 2" end,
  }
end

local function through(fault, more)
  for key, value in pairs(more) do fault[key] = value end
  return fault
end

-- Closes the clients' connections by the management API.
local function close_connections()
  local management = world.management(1)
  local closed = 0
  world.eventually(function()
    for _, connection in ipairs(assert(management:connections())) do
      local properties = connection.client_properties or {}
      local ours = (properties.connection_name or ""):find "^chaos "
      if ours and management:close_connection(connection.name, "chaos") then closed = closed + 1 end
    end
    return closed >= 6
  end, 15)
  assert(closed >= 6, "the management API listed no connections to close")
end

-- Deletes each queue when it is empty, for what is in a deleted queue is gone by order: the publisher stands still
-- meanwhile. (Quorum queues know no `if_empty`.)
local function delete_queues(run)
  run.publisher:signal "STOP"
  world.on(3, function(channel)
    for _, queue in ipairs(run.queues) do
      local quiet = 0
      assert(world.eventually(function()
        quiet = assert(channel:queue_declare(queue, { passive = true })).message_count == 0 and quiet + 1 or 0
        return quiet > 20
      end, 30), queue .. " was never empty")
      assert(channel:queue_delete(queue))
    end
  end)
  run.publisher:signal "CONT"
end

local function declare_queues(run)
  world.on(run.fault.leader or 1, function(channel)
    for _, queue in ipairs(run.queues) do assert(world.declare(channel, queue)) end
  end)
end

local function alarm(on)
  world.ctl(1, "-q", "set_vm_memory_high_watermark", on and "0.00001" or "0.4")
end

return {
  through(kill_and_restart(2), { name = "kill -9, the clients' node", quick = true }),
  through(kill_and_restart(1), { name = "kill -9, the queues' leader", quick = true }),
  through(kill_and_restart(1), { name = "kill -9, clients and leader on one node", clients = 1 }),
  { name = "kill -9 of each node in turn", hold = 0,
    inject = function(run)
      each_node(function(node)
        world.kill(node)
        world.sleep(1)
        world.restart(node)
        assert(world.together(run.queues, 60), "the queues' copies do not come together")
      end)
    end },
  { name = "graceful stop, the clients' node", hold = 1,
    inject = function() world.stop(2) end, heal = function() world.restart(2) end },
  { name = "graceful stop, clients and leader on one node", clients = 1, hold = 1,
    inject = function() world.stop(1) end, heal = function() world.restart(1) end },
  { name = "SIGSTOP, the clients' node", hold = 8,
    inject = function() world.pause(2) end, heal = function() world.resume(2) end },
  { name = "SIGSTOP, the queues' leader", hold = 8,
    inject = function() world.pause(1) end, heal = function() world.resume(1) end },
  through(network_cut(nil), { name = "network cut, no RST (two intervals)", quick = true }),
  through(network_cut { strategy = "fixed", multiple = 1 }, { name = "network cut, no RST (fixed)" }),
  through(network_cut { strategy = "adaptive", probe = 0.5, least = 0.5 },
    { name = "network cut, no RST (adaptive)" }),
  through(network_cut { strategy = "consecutive", probe = 0.5, misses = 3 },
    { name = "network cut, no RST (consecutive)" }),
  { name = "200 ms of latency", via = "links", hold = 6,
    connect = { health = { strategy = "adaptive", probe = 0.5, least = 1 } },
    inject = function() world.link "delay 2 0.2" end, heal = function() world.link "pass 2" end },
  { name = "reset in the middle of a frame", quick = true, via = "links", hold = 2,
    inject = function() world.link "tear 2" end, heal = function() world.link "pass 2" end },
  { name = "memory alarm", hold = 5, quick = true,
    inject = function() alarm(true) end, heal = function() alarm(false) end },
  { name = "connections closed by the management API", hold = 1, inject = close_connections },
  { name = "queue deleted under the consumer", hold = 1, quick = true, inject = delete_queues, heal = declare_queues },
  { name = "publisher killed -9, with an outbox", hold = 1, outbox = true, quick = true,
    inject = function(run) run.kill "publisher" end, heal = function(run) run.start "publisher" end },
  { name = "consumer killed -9", hold = 1,
    inject = function(run) run.kill "consumer" end, heal = function(run) run.start "consumer" end },
  { name = "balancer: kill -9 of two nodes in turn", via = "balancer", hold = 0,
    inject = function(run)
      for _, node in ipairs { 2, 1 } do
        world.kill(node)
        world.sleep(2)
        world.restart(node)
        assert(world.together(run.queues, 60), "the queues' copies do not come together")
      end
    end },
  { name = "balancer killed -9", via = "balancer", hold = 2,
    inject = function() world.kill_balancer() end, heal = function() world.start_balancer() end },
  { name = "several: leader killed, others slow, alarm", via = "links", hold = 4,
    inject = function()
      world.link "delay 2 0.1"
      world.link "delay 3 0.1"
      world.kill(1)
      world.ctl(3, "-q", "set_vm_memory_high_watermark", "0.00001")
    end,
    heal = function()
      world.ctl(3, "-q", "set_vm_memory_high_watermark", "0.4")
      world.restart(1)
      world.links_pass()
    end },
  { name = "several: network cut, publisher killed, node killed", via = "links", hold = 4, outbox = true,
    inject = function(run)
      world.link "silent 2"
      run.kill "publisher"
      world.kill(2)
      run.start "publisher"
    end,
    heal = function()
      world.restart(2)
      world.link "pass 2"
    end },
  { name = "control: no confirms, network swallows", careless = true, loses = true, via = "links", hold = 1,
    quick = true,
    -- All links: the clients may be on another than the first.
    inject = function() each_node(function(node) world.link("swallow " .. node) end) end,
    heal = function()
      each_node(function(node)
        world.link("cut " .. node)
        world.link("pass " .. node)
      end)
    end },
}
