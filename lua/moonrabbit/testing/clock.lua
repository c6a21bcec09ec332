--- A runtime whose time stands still until it is moved: what tests of apps run on. Tasks run in turn; `advance` jumps
-- from one that sleeps to the next. While a task runs, `moonrabbit.sleep` and `moonrabbit.spawn` are this
-- runtime's, so handlers that sleep cost no time.
-- @module moonrabbit.testing.clock

local moonrabbit = require "moonrabbit"

local clock = {}

local unpack = rawget(table, "unpack") or rawget(_G, "unpack")

local function remove(list, value)
  for i = 1, #list do
    if list[i] == value then return table.remove(list, i) end
  end
end

-- The first that is due, in the order of falling asleep.
local function next_sleeper(sleepers)
  local first
  for _, task in ipairs(sleepers) do
    if not first or task.due < first.due then first = task end
  end
  return first
end

--- A runtime (docs/internals.md) with two more functions: `settle()` runs what can run now, `advance(seconds)` moves
--- the time. `wall()` is the time since 1970.
---@param wall number? seconds since 1970 at the beginning; os.time() by default
---@return table
function clock.new(wall)
  local now, ready, sleepers, running = 0, {}, {}, nil
  wall = wall or os.time()
  local M = { name = "testing", cancelled = require "moonrabbit.runtime.shared.cancelled" }

  local function wake(task, value)
    if not task.waits then return end
    task.waits, task.value = false, value
    remove(sleepers, task)
    if task.on then remove(task.on, task) end
    task.on = nil
    ready[#ready + 1] = task
  end

  local function wait(seconds, on)
    local task = running
    if not task then error("a test may wait only within handlers: advance(seconds) moves the time", 3) end
    task.waits, task.on = true, on
    if on then on[#on + 1] = task end
    if task.cancelling then -- since before this wait: only to give way once
      wake(task, false)
    elseif seconds then
      task.due = now + math.max(0, seconds)
      sleepers[#sleepers + 1] = task
    end
    coroutine.yield()
    if task.cancelling then
      task.cancelling = false
      error(M.cancelled, 0)
    end
    return task.value
  end

  local function step(task)
    local sleep, spawn = moonrabbit.sleep, moonrabbit.spawn
    moonrabbit.sleep, moonrabbit.spawn, running = M.sleep, M.spawn, task
    local ok, err = coroutine.resume(task.thread)
    moonrabbit.sleep, moonrabbit.spawn, running = sleep, spawn, nil
    if not ok and err ~= M.cancelled then error(debug.traceback(task.thread, tostring(err)), 0) end
  end

  function M.now() return now end
  function M.wall() return wall + now end
  function M.current() return running end
  function M.sleep(seconds) wait(seconds) end

  function M.spawn(fn, ...)
    local arguments, n = { ... }, select("#", ...)
    local task = { thread = coroutine.create(function() return fn(unpack(arguments, 1, n)) end) }
    ready[#ready + 1] = task
    return task
  end

  function M.cancel(task)
    task.cancelling = true
    wake(task, false)
  end

  function M.condition()
    local waiting = {}
    return {
      wait = function(_, seconds) return wait(seconds, waiting) or false end,
      signal = function() if waiting[1] then wake(waiting[1], true) end end,
      broadcast = function() while waiting[1] do wake(waiting[1], true) end end,
    }
  end

  function M.settle()
    while ready[1] do step(table.remove(ready, 1)) end
  end

  function M.advance(seconds)
    local till = now + seconds
    M.settle()
    local first = next_sleeper(sleepers)
    while first and first.due <= till do
      now = math.max(now, first.due)
      wake(first, false)
      M.settle()
      first = next_sleeper(sleepers)
    end
    now = till
  end

  return M
end

return clock
