--- The publisher of the harness: `rate` messages a second into each queue, each with the publisher's id and a
-- serial, and a line in the ledger for each that is confirmed. Beside what worker.lua says its plan has
--
-- * `rate`       messages a second for each queue
-- * `first`      the first serial
-- * `outbox`     a folder: messages go through an outbox in it, and are promised once it has them
-- * `careless`   no confirms: what was handed to the network counts as done (the control run)
--
-- SIGTERM: nothing new is sent, the rest is waited for.
local native = require "moonrabbit.runtime.native"
local worker = require "chaos.worker"

-- So long a message may take to be confirmed, outages included.
local PATIENCE = 120

local PADDING = (" "):rep(200)

local function body(plan, serial) return ("%s %d%s"):format(plan.id or "p", serial, PADDING) end

-- Calls fn(serial) at the plan's rate until told to stop; fn returns false to have the same serial again.
local function at_rate(plan, stopping, fn)
  local serial, due = plan.first or 1, native.now()
  while not stopping() do
    local now = native.now()
    if due > now then native.sleep(due - now) end
    if fn(serial) ~= false then serial = serial + 1 end
    -- What could not be sent in time is not made up for.
    due = math.max(due + 1 / plan.rate, native.now() - 0.1)
  end
end

local function carelessly(plan, queue, stopping)
  local conn = worker.connect(plan, queue)
  local channel = assert(conn:channel())
  at_rate(plan, stopping, function(serial)
    if not channel:publish(body(plan, serial), { routing_key = queue }) then
      native.sleep(0.05)
      return false
    end
    plan.book:write("confirmed", queue, serial)
  end)
  conn:close(5)
end

-- Waits for each confirmation in turn and writes down what became of it.
local function harvest(plan, queue, waiting)
  while not (waiting.over and waiting.head > waiting.tail) do
    local one = waiting[waiting.head]
    if one then
      waiting[waiting.head] = nil
      waiting.head = waiting.head + 1
      local ok, err = one.confirmation:wait(PATIENCE)
      if ok then
        plan.book:write("confirmed", queue, one.serial)
      else
        plan.book:write("failed", queue, one.serial, err)
      end
    else
      waiting.more:wait(0.5)
    end
  end
  waiting.done = true
  waiting.more:broadcast()
end

local function outbox(plan, queue)
  if not plan.outbox then return nil end
  return { kind = "sqlite", path = plan.outbox .. "/" .. queue .. ".db", synchronous = false, interval = 1 }
end

local function carefully(plan, queue, stopping)
  local conn = worker.connect(plan, queue)
  local publisher = assert(conn:publisher {
    routing_key = queue, window = 64, timeout = PATIENCE, outbox = outbox(plan, queue),
    retry = { first = 0.1, max = 1, attempts = math.huge, on_return = true },
  })
  local waiting = { head = 1, tail = 0, more = native.condition() }
  native.spawn(harvest, plan, queue, waiting)
  at_rate(plan, stopping, function(serial)
    local confirmation, err = publisher:send_async(body(plan, serial))
    if not confirmation then
      plan.book:write("event", queue, serial, "refused " .. tostring(err))
      native.sleep(0.05)
      return false
    end
    if plan.outbox then plan.book:write("sent", queue, serial) end
    waiting.tail = waiting.tail + 1
    waiting[waiting.tail] = { confirmation = confirmation, serial = serial }
    waiting.more:signal()
  end)
  waiting.over = true
  waiting.more:broadcast()
  while not waiting.done do waiting.more:wait(0.5) end
  if plan.outbox then publisher:wait(PATIENCE) end
  conn:close(5)
end

local plan = dofile(arg[1])
worker.run(plan.careless and carelessly or carefully)
