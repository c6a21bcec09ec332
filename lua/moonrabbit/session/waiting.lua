--- Who waits for which answer of the broker.
-- @module moonrabbit.session

local protect = require "moonrabbit.protect"

local max, huge = math.max, math.huge

---@class moonrabbit.Session
local Session = {}

local function wait_here(self, condition, timeout)
  local check_owner = self.transport.check_owner
  if check_owner then check_owner(self.transport) end
  condition:wait(timeout)
end

--- Waits on a condition for something that only reading can bring. false, err: the task was cancelled, or may not wait
--- here, and err is to be thrown; another one of those who wait has what it may have been woken for.
---@param left number seconds
---@return boolean waited, any err
function Session:try_block(condition, left)
  local until_then = self.runtime.now() + left
  if self:read_alone(until_then) then return true end
  self.awaiting = self.awaiting + 1
  if until_then > self.awaiting_until then self.awaiting_until = until_then end
  if self.paused and self:may_admit() then self.drained:signal() end
  local whole, err = protect(wait_here, self, condition, left < huge and left or nil)
  self.awaiting = self.awaiting - 1
  if whole then return true end
  condition:signal()
  return false, err
end

--- The same, and throws what is to be thrown.
---@param left number seconds
function Session:block(condition, left)
  local whole, err = self:try_block(condition, left)
  if not whole then error(err, 0) end
end

--- Queues a call whose method was just handed to the engine. `late(result)` is called when the
--- answer comes after the caller has given up.
---@param calls moonrabbit.Calls
---@return moonrabbit.Call
function Session:expect(calls, what, late)
  local call = { what = what, condition = self.runtime.condition(), late = late, done = false }
  calls:push(call)
  self:touch()
  return call
end

local function wait_for(self, call, deadline)
  local now = self.runtime.now
  while not call.done do
    local left = deadline - now()
    if left <= 0 then return end
    self:block(call.condition, left)
  end
end

-- Nobody takes the answer, which may have come.
local function abandon(call)
  call.abandoned = true
  if call.done and call.ok and call.late then call.late(call.result, call.extra) end
end

--- Waits for a call: its result, or nil, err.
---@param call moonrabbit.Call
---@param timeout number
function Session:await(call, timeout)
  local whole, err = protect(wait_for, self, call, self.runtime.now() + timeout)
  if not whole then -- the task was cancelled, or may not wait here
    abandon(call)
    error(err, 0)
  end
  if not call.done then
    call.abandoned = true
    return nil, self:error("timeout", ("no answer to %s within %g s"):format(call.what, timeout))
  end
  if call.ok then return call.result, call.extra end
  return nil, call.result
end

--- Waits for calls that went out together: true, or nil and the first error, with the others abandoned.
---@param calls moonrabbit.Call[]
---@param deadline number
---@return true|nil, moonrabbit.Error?
function Session:await_all(calls, deadline)
  local now = self.runtime.now
  for i, call in ipairs(calls) do
    local whole, ok, err = protect(self.await, self, call, max(0, deadline - now()))
    if not whole or not ok then
      for j = i + 1, #calls do abandon(calls[j]) end
      if not whole then error(ok, 0) end
      return nil, err
    end
  end
  return true
end

return Session
