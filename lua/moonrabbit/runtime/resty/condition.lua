--- Conditions on nginx's semaphores, which keep what is posted while nobody waits: so it is counted what was
--- posted and not taken yet, and no more is posted than waits.

local semaphore = require "ngx.semaphore"
local limits = require "moonrabbit.runtime.resty.limits"
local tasks = require "moonrabbit.runtime.resty.tasks"

local current, check, LEAST, LONG = tasks.current, tasks.check, limits.LEAST, limits.LONG

local max = math.max

local Condition = {}
Condition.__index = Condition

local function wait_for(posted, timeout)
  if timeout and timeout < LONG then
    -- Less than a millisecond is none to nginx, which would not yield; less than none it throws at.
    return posted:wait(timeout > 0 and max(timeout, LEAST) or 0)
  end
  local ok
  repeat ok = posted:wait(LONG) until ok or timeout and timeout < math.huge
  return ok
end

function Condition:wait(timeout)
  local task = current()
  if task then
    check(task)
    task.on = self
  end
  self.waiting = self.waiting + 1
  local ok = wait_for(self.semaphore, timeout)
  self.waiting = self.waiting - 1
  if ok then
    self.posted = self.posted - 1
  elseif self.posted > self.waiting then
    -- The signal came with the timeout: it was this one's, and is not kept.
    self.semaphore:wait(0)
    self.posted = self.posted - 1
  end
  if task then
    task.on = nil
    check(task)
  end
  return ok and true or false
end

function Condition:signal()
  if self.posted < self.waiting then
    self.posted = self.posted + 1
    self.semaphore:post(1)
  end
end

function Condition:broadcast()
  local n = self.waiting - self.posted
  if n > 0 then
    self.posted = self.posted + n
    self.semaphore:post(n)
  end
end

---@return moonrabbit.Condition
return function() return setmetatable({ semaphore = semaphore.new(), waiting = 0, posted = 0 }, Condition) end
