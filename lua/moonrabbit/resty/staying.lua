--- What a worker that is told to leave waits for no longer than it may stay. A function of the user's that waits by other
-- means than moonrabbit (`ngx.sleep`, a cosocket) is left to itself, and holds the worker while it does.
-- @module moonrabbit.resty.staying

local runtime = require "moonrabbit.runtime.resty"

local staying = {}

---@class moonrabbit.resty.Job
---@field task table
---@field over boolean
---@field whole boolean?  it has not thrown
---@field result any      what it returned, or has thrown
---@field extra any       what it returned besides

local function perform(job, turned, fn, ...)
  job.whole, job.result, job.extra = xpcall(fn, debug.traceback, ...)
  job.over = true
  turned:broadcast()
end

--- Runs fn in a task and waits until it is over, or nothing is left of the time; then it goes on by itself.
---@param turned table   a condition that is told when the worker is to leave
---@param left fun(): number?  the seconds that are left; nil: as many as it takes
---@param fn function
---@param ... any its arguments
---@return moonrabbit.resty.Job
function staying.run(turned, left, fn, ...)
  local job = { over = false }
  job.task = runtime.spawn(perform, job, turned, fn, ...)
  local seconds = left()
  while not job.over and not (seconds and seconds <= 0) do
    turned:wait(seconds)
    seconds = left()
  end
  return job
end

return staying
