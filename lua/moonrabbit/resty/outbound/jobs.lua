--- Functions that run where the connection lives: `run` and `call`.
-- @module moonrabbit.resty.outbound.jobs

local obstacles = require "moonrabbit.resty.outbound.obstacles"
local runtime = require "moonrabbit.runtime.resty"
local semaphore = require "ngx.semaphore"
local wait_for = require "moonrabbit.resty.outbound.wait"

local jobs = {}

--- Starts those that wait for a connection.
function jobs.start(self, conn)
  local waiting = self.jobs
  while waiting[1] do
    runtime.spawn(waiting[1].run, conn)
    table.remove(waiting, 1)
  end
end

--- Those that wait for a connection will have none.
function jobs.fail(self, err)
  local waiting = self.jobs
  self.jobs = {}
  for _, job in ipairs(waiting) do
    self.running = self.running - 1
    job.results = { n = 3, true, nil, err }
    job.done:post(1)
  end
end

--- Runs fn(conn) in the timer that the connection belongs to, and waits for what it returns. What it throws
--- is thrown here.
---@param fn fun(conn: moonrabbit.Connection): any
---@param timeout number seconds
---@return any ...
function jobs.run(self, fn, timeout)
  local failure = obstacles.refused(self)
  if failure then return nil, failure end
  if self.running >= self.config.calls then
    self.overflows = self.overflows + 1
    return nil, self:error("overflow", ("%d calls are under way in this worker"):format(self.running))
  end
  local job = { done = semaphore.new() }
  function job.run(conn)
    local results = { pcall(fn, conn) }
    results.n = table.maxn(results)
    self.running = self.running - 1
    job.results = results
    job.done:post(1)
  end
  self.running = self.running + 1
  self.jobs[#self.jobs + 1] = job
  self:rouse()
  self.keeper:need()
  wait_for(job.done, timeout)
  local results = job.results
  if not results then
    for i = #self.jobs, 1, -1 do
      if self.jobs[i] == job then
        table.remove(self.jobs, i)
        self.running = self.running - 1
      end
    end
    return nil, obstacles.away(self, timeout) or self:error("timeout", ("no answer within %g s"):format(timeout))
  end
  if not results[1] then error(results[2], 0) end
  return unpack(results, 2, results.n)
end

return jobs
