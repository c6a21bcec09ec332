--- Runs that take too long. All runs of a consumer have the same time, so the one that began first is due
-- first: a list in the order of their start, and one task that sleeps until its head is due.
-- @module moonrabbit.app.runner.watch

---@class moonrabbit.app.Watch
local Watch = {}
Watch.__index = Watch

--- `expired(job)` is called in the watch's task; it must not wait.
---@param runtime table
---@param seconds number
---@param expired fun(job: table)
---@return moonrabbit.app.Watch
function Watch.new(runtime, seconds, expired)
  return setmetatable({ runtime = runtime, now = runtime.now, seconds = seconds, expired = expired,
    wake = runtime.condition(), over = false, first = false, last = false, watching = false }, Watch)
end

local function watch(self)
  while self.first and not self.over do
    local left = self.first.due - self.now()
    if left > 0 then
      self.wake:wait(left)
    else
      local job = self.first
      self:remove(job)
      self.expired(job)
    end
  end
  self.watching = false
end

--- A run has started.
---@param job table
---@param now number
function Watch:add(job, now)
  job.due = now + self.seconds
  local last = self.last
  job.before, job.after = last, false
  if last then last.after = job else self.first = job end
  self.last = job
  if not self.watching then
    self.watching = true
    self.runtime.spawn(watch, self)
  end
end

--- No run is watched any more.
function Watch:stop()
  self.over = true
  self.wake:broadcast()
end

--- It is over.
---@param job table
function Watch:remove(job)
  if not job.due then return end
  local before, after = job.before, job.after
  if before then before.after = after else self.first = after end
  if after then after.before = before else self.last = before end
  job.due, job.before, job.after = false, false, false
end

return Watch
