--- Conditions: tasks that wait in line for a signal. The line is linked through the tasks
--- themselves (`prev`, `next`), so that waiting and signalling allocate nothing.
--
-- Made for a loop: { enter, park, ready } as in native/loop.lua and shared/hosted.lua. Where the loop
-- has `home`, a condition is waited for at home only.

local now = require("moonrabbit.net").now

local M = {}

--- The constructor of a loop's conditions.
---@return fun(): moonrabbit.Condition
function M.of(loop)
  local enter, park, ready, home = loop.enter, loop.park, loop.ready, loop.home

  ---@class moonrabbit.Condition
  local Condition = {}
  Condition.__index = Condition

  local function unlink(self, task)
    local before, after = task.prev, task.next
    if before then before.next = after else self.first = after end
    if after then after.prev = before else self.last = before end
    task.prev, task.next = nil, nil
  end

  --- Waits for a signal.
  ---@param timeout number? seconds
  ---@return boolean signalled false: the timeout came first
  function Condition:wait(timeout)
    local task = enter(self.home)
    local last = self.last
    task.on, task.prev = self, last
    if last then last.next = task else self.first = task end
    self.last = task
    return park(task, timeout and now() + timeout)
  end

  --- The task gives up waiting.
  function Condition:forget(task) unlink(self, task) end

  --- Wakes the task that has waited longest; without one nothing happens, now or later.
  function Condition:signal()
    local task = self.first
    if task then
      unlink(self, task)
      ready(task, true)
    end
  end

  --- Wakes everyone who waits now.
  function Condition:broadcast()
    local task = self.first
    self.first, self.last = nil, nil
    while task do
      local after = task.next
      task.prev, task.next = nil, nil
      ready(task, true)
      task = after
    end
  end

  if home then
    return function() return setmetatable({ first = nil, last = nil, home = home() }, Condition) end
  end
  return function() return setmetatable({ first = nil, last = nil }, Condition) end
end

return M
