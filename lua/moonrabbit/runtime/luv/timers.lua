--- Timers of libuv. They belong to pauses and not to tasks, for nobody says when a coroutine of the user's is over; some are
--- kept for the next pauses.
-- @module moonrabbit.runtime.luv.timers

local uv = require "luv"

local ceil, min = math.ceil, math.min

local MOST_KEPT = 64
--- Seconds; longer pauses are made of several, for libuv wants an integer.
local LONGEST = 1e6

local kept, count = {}, 0

local M = {}

local function new()
  local timer = { handle = uv.new_timer(), task = nil, expired = nil }
  function timer.call()
    if timer.task then timer.expired(timer.task) end
  end
  return timer
end

local function take()
  while count > 0 do
    local timer = kept[count]
    kept[count] = nil
    count = count - 1
    if not timer.handle:is_closing() then return timer end -- a user may have closed every handle
  end
  return new()
end

--- Calls expired(task) after so many seconds, unless the timer is given back before.
function M.start(task, seconds, expired)
  local timer = take()
  timer.task, timer.expired = task, expired
  uv.update_time()
  -- libuv's time is cut off to milliseconds: one more, or the timer may be early, and is waited for again.
  timer.handle:start(ceil(min(seconds, LONGEST) * 1000) + 1, 0, timer.call)
  return timer
end

function M.give_back(timer)
  timer.task = nil
  local handle = timer.handle
  if handle:is_closing() then return end
  if count == MOST_KEPT then
    handle:close()
    return
  end
  handle:stop()
  count = count + 1
  kept[count] = timer
end

return M
