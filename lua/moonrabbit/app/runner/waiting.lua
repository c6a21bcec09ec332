--- How the runner waits: for a place among the `concurrency`, and for a time.
-- @module moonrabbit.app.runner

---@class moonrabbit.app.Runner
local Runner = {}

--- Waits, unless the runner stops.
---@param seconds number
---@param breaker moonrabbit.app.Breaker? it waits no longer than until this one has closed
---@return boolean whether it goes on
function Runner:pause(seconds, breaker)
  if self.stopping then return false end
  local now = self.now
  local deadline = now() + seconds
  repeat
    self.wake:wait(math.max(0, deadline - now()))
    if self.stopping then return false end
  until now() >= deadline or breaker and breaker.state == "closed"
  return true
end

--- Takes a place among the `concurrency`, in the order of those who ask.
---@package
function Runner:acquire()
  if self.running < self.limit then
    self.running = self.running + 1
    return
  end
  self.waiting = self.waiting + 1
  self.slot:wait() -- the place is handed over
end

---@package
function Runner:release()
  if self.waiting > 0 then
    self.waiting = self.waiting - 1
    self.slot:signal()
  else
    self.running = self.running - 1
  end
end

--- Waits without a place. False: the runner stops, or the message has gone back to its queue meanwhile.
---@param job table
---@param seconds number
---@param breaker moonrabbit.app.Breaker? as for pause
---@return boolean
function Runner:rest(job, seconds, breaker)
  local slot = job.slot
  if slot then
    job.slot = false
    self:release()
  end
  local goes_on = self:pause(seconds, breaker)
  if slot then
    self:acquire()
    job.slot = true
  end
  return goes_on and (job.batch or self.settle.outstanding(job.message) ~= nil)
end

--- Waits until a job is to run again. False: it does not, and its message has been given back.
---@package
---@param job table
---@param seconds number
---@return boolean
function Runner:rested(job, seconds)
  if self:rest(job, seconds) then return true end
  self:put_back(job)
  return false
end

return Runner
