--- The client's own share of a failover: from the moment its socket fails to the next confirm, on another node.
--
-- The client publishes without a pause through the links; the link it is on is cut and refuses, the others carry
-- on; the queue is led by a third node, so that no election is measured. A quarter of the links' and the kernel's
-- time is in it, too: it is counted from before the command that cuts.
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local world = require "chaos.world"
local report = require "chaos.report"

local failover = {}

local TIMES = 20
local PATIENCE = 30

-- Publishes for as long as `state.going`, and notes when the last confirm came.
local function publish(conn, queue, state)
  local publisher = assert(conn:publisher { routing_key = queue, window = 16, timeout = PATIENCE })
  while state.going do
    if publisher:send("x", { timeout = PATIENCE }) then
      state.confirmed_at = native.now()
      state.more:broadcast()
    end
    native.sleep(0.002)
  end
end

-- Cuts the link that the client is on; seconds until the next confirm.
local function once(link, state)
  local cut_at = native.now()
  world.link("refuse " .. link)
  -- A confirm that was under way may still be counted as of before.
  local from = native.now()
  while (state.confirmed_at or 0) <= from and native.now() - cut_at < PATIENCE do state.more:wait(0.1) end
  return state.confirmed_at - cut_at
end

local function link_of(conn, endpoints)
  for i, uri in ipairs(endpoints) do
    if tostring(conn.endpoint):match ":(%d+)$" == uri:match ":(%d+)/" then return i end
  end
end

--- Measures with a queue of a kind: { kind, times (list of seconds), median, worst }.
function failover.measure(kind)
  local queue = world.queue_name("failover", kind)
  world.on(3, function(channel) assert(world.declare(channel, queue)) end)
  local endpoints = world.endpoints("links", 1)
  local times = {}
  native.run(function()
    local conn = assert(moonrabbit.connect { endpoints = { endpoints[1], endpoints[2] }, heartbeat = 2,
      connect_timeout = 2, reconnect = { stable = 0.5 }, log = function() end })
    local state = { going = true, more = native.condition() }
    native.spawn(publish, conn, queue, state)
    for i = 1, TIMES do
      native.sleep(0.7) -- long enough to count as stable
      local link = link_of(conn, endpoints)
      times[i] = once(link, state)
      world.link("pass " .. link)
    end
    state.going = false
    conn:close(5)
  end)
  world.on(3, function(channel) channel:queue_delete(queue) end)
  return { kind = kind, times = times, median = report.median(times), worst = math.max(table.unpack(times)) }
end

return failover
