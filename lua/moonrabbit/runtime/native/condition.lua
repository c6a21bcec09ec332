--- Conditions: tasks that wait in line for a signal. The line is linked through the tasks
--- themselves (`prev`, `next`), so that waiting and signalling allocate nothing.

local loop = require "moonrabbit.runtime.native.loop"

local enter, park, ready, now = loop.enter, loop.park, loop.ready, require("moonrabbit.net").now

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
  local task = enter()
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

local M = {}

---@return moonrabbit.Condition
function M.new() return setmetatable({ first = nil, last = nil }, Condition) end

return M
