--- A breaker: when too much fails, the consumer pauses, for what it depends on is likely to be away. After
-- the pause one message is tried; when it succeeds, all go on.
--
-- States: "closed" (all is well), "open" (paused), "probing" (one message is on its way). Failures that no retry
-- helps against are the message's fault and do not count.
-- @module moonrabbit.app.flow.breaker

---@class moonrabbit.app.Breaker
---@field state "closed"|"open"|"probing"
local Breaker = {}
Breaker.__index = Breaker

--- The seconds for which it holds messages.
---@param spec moonrabbit.AppBreakerOptions
---@return number
function Breaker.hold_of(spec) return spec.hold or 300 end

---@param spec moonrabbit.AppBreakerOptions
---@return moonrabbit.app.Breaker
function Breaker.new(spec)
  return setmetatable({
    limit = spec.failures, within = spec.within or 60, pause = spec.pause or 10, hold = Breaker.hold_of(spec),
    state = "closed", times = {}, next = 1, probe = false, resumes = 0,
  }, Breaker)
end

--- Whether a job may run now; else the seconds until it is worth asking again.
---@param job table
---@param now number
---@return true|number
function Breaker:admit(job, now)
  if self.state == "closed" then return true end
  if self.state == "open" and now >= self.resumes then
    self.state, self.probe = "probing", job
    return true
  end
  if self.probe == job then return true end
  return self.state == "open" and self.resumes - now or self.pause
end

local function open(self, now)
  self.state, self.probe, self.resumes = "open", false, now + self.pause
  self.times, self.next = {}, 1
end

-- The last `limit` failures stand in a ring.
local function one_too_many(self, now)
  self.times[self.next] = now
  self.next = self.next % self.limit + 1
  local oldest = self.times[self.next]
  return oldest ~= nil and now - oldest <= self.within
end

--- How a job's run ended. A string when the state has changed: the new one.
---@param job table
---@param ok boolean
---@param now number
---@return "open"|"closed"|nil
function Breaker:result(job, ok, now)
  if self.state == "closed" then
    if ok or not one_too_many(self, now) then return nil end
    open(self, now)
    return "open"
  end
  if self.probe ~= job then return nil end
  if not ok then
    open(self, now)
    return "open"
  end
  self.state, self.probe = "closed", false
  return "closed"
end

--- Another job stands for one that was let in.
---@param job table
---@param other table
function Breaker:hand_over(job, other)
  if self.probe == job then self.probe = other end
end

--- A job that was let in did not run after all.
---@param job table
function Breaker:withdraw(job)
  if self.probe == job then self.state, self.probe = "open", false end
end

-- The failures that stand in the ring, the oldest first.
local function in_order(self)
  local list, times = {}, self.times
  local count = #times
  local first = count < self.limit and 1 or self.next
  for i = 0, count - 1 do list[i + 1] = times[(first - 1 + i) % count + 1] end
  return list
end

--- What a reload carries over.
---@return table
function Breaker:save()
  return { state = self.state, resumes = self.resumes, failures = in_order(self) }
end

--- Takes it over.
---@param state table
function Breaker:restore(state)
  self.state = state.state == "closed" and "closed" or "open"
  self.resumes = state.resumes
  local failures, times = state.failures, {}
  for i = math.max(1, #failures - self.limit + 1), #failures do times[#times + 1] = failures[i] end
  self.times, self.next = times, #times % self.limit + 1
end

return Breaker
