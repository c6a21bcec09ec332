--- How the runner ends, and what it hands to the one that takes its place.
-- @module moonrabbit.app.runner

---@class moonrabbit.app.Runner
local Runner = {}

--- Begins to stop: who waits (for a retry, the rate, the breaker) gives its message back; handlers end.
function Runner:stop()
  self.stopping = true
  self.wake:broadcast()
  if self.batch then self.batch:flush() end
end

--- Waits until nothing is in flight.
---@param deadline number
---@return boolean
function Runner:drained(deadline)
  self.draining = true
  while self.in_flight > 0 do
    local seconds = deadline - self.now()
    if seconds <= 0 then return false end
    self.quiet:wait(seconds)
  end
  return true
end

--- Whether the task that calls runs one of its handlers.
---@return boolean
function Runner:is_caller()
  local task = self.current()
  if task == nil then return false end
  for job in pairs(self.jobs) do
    if job.task == task and not job.over then return true end
  end
  return false
end

--- Ends what is left: handlers are cancelled where that can be, messages go back.
function Runner:abort()
  self.stopping, self.stopped = true, true
  self.wake:broadcast()
  if self.watch then self.watch:stop() end
  local cancel = self.runtime.cancel
  if not cancel then return end
  for job in pairs(self.jobs) do
    if not job.over and job.task then cancel(job.task) end
  end
end

--- What a reload carries over: breaker and canaries.
---@return table
function Runner:state()
  local canaries = {}
  for i, canary in ipairs(self.canaries) do canaries[i] = canary:state() end
  return { breaker = self.breaker and self.breaker:save(), canaries = canaries,
    dedupe = self.dedupe and self.dedupe:state() }
end

--- Takes it over.
---@param state table
function Runner:restore(state)
  if state.breaker and self.breaker then self.breaker:restore(state.breaker) end
  if state.dedupe and self.dedupe then self.dedupe:restore(state.dedupe) end
  for _, canary in ipairs(self.canaries) do
    for _, old in ipairs(state.canaries) do canary:restore(old) end
  end
end

return Runner
