--- One fault: queues, a consumer and a publisher under load, the fault, its end, and what it came to.
local world = require "chaos.world"
local account = require "chaos.account"

local scenario = {}

local RATE = 100     -- messages a second into each queue
local STEADY = 50    -- messages of each queue that are delivered before the fault
local SETTLED = 1.5  -- seconds of load after everything flows again
local RECOVERY = 90  -- seconds that this may take
local DRAIN = 90     -- seconds in which every promised message must have been delivered

local function prepare(run)
  local fault = run.fault
  run.queues = {}
  for i, kind in ipairs(fault.kinds or world.kinds) do run.queues[i] = world.queue_name(fault.name, kind) end
  assert(world.eventually(function()
    return pcall(world.on, fault.leader or 1, function(channel)
      for _, queue in ipairs(run.queues) do
        if not world.declare(channel, queue) then error "not declared" end
        if not channel:queue_purge(queue) then error "not purged" end
      end
    end)
  end, 60), "the queues could not be declared")
end

local function plan(run, kind)
  local fault = run.fault
  local opts = { endpoints = world.endpoints(fault.via or "nodes", fault.clients or 2), queues = run.queues,
    connect = fault.connect }
  if kind == "publisher" then
    opts.rate, opts.careless, opts.id = RATE, fault.careless, "p"
    opts.outbox = fault.outbox and run.where or nil
    opts.first = run.next_serial
  end
  return opts
end

-- One that is started again goes on with the same ledger, and with serials that were never used.
local function start(run, kind)
  if kind == "publisher" and run.publisher then
    local highest = 0
    for _, entry in ipairs(run.publisher.book:read().entries) do highest = math.max(highest, entry.serial) end
    run.next_serial = highest + 1000
  end
  run[kind] = world.start_worker(kind, run.where, plan(run, kind))
end

local function kill(run, kind)
  local worker = run[kind]
  if not worker then return end
  world.kill_worker(worker)
end

-- Whether every queue has had `n` entries of a kind since a moment.
local function flows(run, since, n)
  local published, consumed = run.publisher.book:read().entries, run.consumer.book:read().entries
  for _, queue in ipairs(run.queues) do
    local function counted(entries, kind)
      local count = 0
      for i = #entries, 1, -1 do
        local entry = entries[i]
        if entry.at < since or count >= n then break end
        if entry.queue == queue and entry.kind == kind then count = count + 1 end
      end
      return count >= n
    end
    if not counted(published, "confirmed") or not counted(consumed, "delivered") then return false end
  end
  return true
end

local function drained(run)
  local consumed = run.consumer.book:read().entries
  local published = run.publisher.book:read().entries
  for _, queue in ipairs(run.queues) do
    if account.of(queue, published, consumed, 0, 0).lost > 0 then return false end
  end
  return true
end

local function finish(run)
  run.problems[#run.problems + 1] = world.end_worker(run.publisher, 130)
  run.publisher.book:read()
  run.drained = world.eventually(function() return drained(run) end, run.fault.loses and 5 or DRAIN)
  if run.fault.loses then world.sleep(1) end
  run.problems[#run.problems + 1] = world.end_worker(run.consumer, 20)
  run.consumer.book:read()
end

local function cleanup(run)
  pcall(world.on, 1, function(channel)
    for _, queue in ipairs(run.queues) do channel:queue_delete(queue, { timeout = 20 }) end
  end)
end

local function play(run)
  local fault = run.fault
  prepare(run)
  start(run, "consumer")
  start(run, "publisher")
  if not world.eventually(function() return flows(run, 0, STEADY) end, 60) then
    error("nothing flows even before the fault: " .. run.publisher:err() .. run.consumer:err())
  end
  run.began = world.now()
  fault.inject(run)
  world.sleep(fault.hold or 3)
  if fault.heal then fault.heal(run) end
  run.healed = world.now()
  run.recovered = world.eventually(function() return flows(run, run.healed, 20) end, RECOVERY) or false
  if run.recovered then world.sleep(SETTLED) else run.problems[#run.problems + 1] = "it does not flow again" end
  run.ended = world.now()
  finish(run)
  cleanup(run)
end

--- Plays a fault. Returns the run: `rows` (one for each queue, see account.of), `problems`, `began` …
function scenario.play(fault)
  local run = { fault = fault, world = world, where = world.folder(fault.name), problems = {}, rows = {} }
  run.kill = function(kind) kill(run, kind) end
  run.start = function(kind) start(run, kind) end
  local ok, err = xpcall(play, debug.traceback, run)
  if not ok then
    run.problems[#run.problems + 1] = tostring(err)
    for _, kind in ipairs { "publisher", "consumer" } do
      if run[kind] then pcall(world.kill_worker, run[kind]) end
    end
  end
  if run.began then
    for i, queue in ipairs(run.queues) do
      local row = account.of(queue, run.publisher.book:read().entries, run.consumer.book:read().entries, run.began,
        run.ended or world.now())
      row.queue = (fault.kinds or world.kinds)[i]
      row.name = queue
      run.rows[i] = row
    end
  end
  return run
end

return scenario
