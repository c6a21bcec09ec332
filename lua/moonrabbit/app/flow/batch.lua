--- Batches: messages are gathered until there are `size` of them or the first has waited `wait` seconds, and
-- handled together. The handler gets a list, and says what became of it:
--
-- * nothing or true: all are acked; `nil, err`, a throw, an outcome: holds for all
-- * a table: `results[i]` is for message i: nil or true (acked), an outcome, or anything else, which is the error
--   that it failed of
--
-- A batch has one place among the `concurrency`, one `timeout`, and takes as many of the `rate` as it has messages.
-- A message that is retried in the process is a batch of its own then.
-- @module moonrabbit.app.flow.batch

local errors = require "moonrabbit.errors"
local failure = require "moonrabbit.app.failure"

---@class moonrabbit.app.Batch
local Batch = {}
Batch.__index = Batch

---@param spec moonrabbit.AppBatchOptions
---@param runner table
---@return moonrabbit.app.Batch
function Batch.new(spec, runner)
  return setmetatable({ size = spec.size, wait = spec.wait, runner = runner, open = false }, Batch)
end

-- ---- What a handler says ----------------------------------------------------------------------------

-- Why a table of results means nothing, or nil.
local function nonsense(results, n)
  for i in pairs(results) do
    if type(i) ~= "number" or i < 1 or i > n or i ~= math.floor(i) then
      return ("the handler of a batch of %d returned a table with an entry [%s]"):format(n, tostring(i))
    end
  end
end

-- One answer for all: failure, outcome; or the table of results.
local function verdict(runner, run, ok, thrown)
  if run.expired then return failure.timeout(runner.consumer.timeout) end
  if not ok then return failure.of_thrown(thrown) end
  local results = run.value
  if type(results) ~= "table" or getmetatable(results) ~= nil then
    return failure.of_results(run.n, results, run.reason)
  end
  local problem = nonsense(results, #run.batch)
  if problem then return failure.new("nonsense", problem) end
  return nil, nil, results
end

local function of_result(result)
  if result == nil or result == true then return nil end
  local failed, asked = failure.of_results(2, nil, result)
  return failed, asked
end

-- ---- Running ----------------------------------------------------------------------------------------

local execute

-- Concludes one message; a retry in the process is a batch of one.
local function conclude(runner, job, failed, asked)
  local again = runner:conclude(job, failed, asked)
  if not again or not runner:rested(job, again) then return runner:finish(job) end
  if job.reclaim and not runner:reclaimed(job) then return end
  execute(runner, { job })
end

local function conclude_all(runner, run, failed, asked, results)
  for i, job in ipairs(run.batch) do
    job.started = run.started
    local f, a = failed, asked
    if results then f, a = of_result(results[i]) end
    if f or a then
      -- A failure belongs to one message: the attempt is noted in it.
      runner.runtime.spawn(conclude, runner, job, f and errors.copy(f), a)
    else
      conclude(runner, job)
    end
  end
end

local function leave(runner, run)
  if not run.slot then return end
  run.slot = false
  runner:release()
end

-- The jobs whose messages the broker has not taken back meanwhile, as a run; nil: none is left.
local function run_of(runner, jobs)
  local messages, left = {}, {}
  for _, job in ipairs(jobs) do
    if runner.settle.outstanding(job.message) then
      messages[#messages + 1], left[#left + 1] = job.message, job
    else
      runner:put_back(job)
      runner:finish(job)
    end
  end
  if #left == 0 then return nil end
  local run = { message = messages, batch = left, slot = true, serial = 0, n = 0, over = true }
  runner.jobs[run] = true
  for i = 1, #left do left[i].of = run end
  return run, left
end

function execute(runner, jobs)
  runner:acquire()
  local run
  run, jobs = run_of(runner, jobs)
  if not run then return runner:release() end
  local ok, thrown = runner:attempt(run, #jobs)
  if ok == runner.LEFT then return end
  leave(runner, run)
  if ok == runner.STOPPED or (not ok and thrown == runner.runtime.cancelled and thrown ~= nil and not run.expired) then
    for _, job in ipairs(jobs) do
      runner:put_back(job)
      runner:finish(job)
    end
    return
  end
  if run.expired and ok then runner:swallow() end
  conclude_all(runner, run, verdict(runner, run, ok, thrown))
end

--- The handler of a run goes on although its time is over.
---@package
function Batch:expired(run)
  leave(self.runner, run)
  conclude_all(self.runner, run, failure.timeout(self.runner.consumer.timeout))
end

-- ---- Gathering --------------------------------------------------------------------------------------

local function close(self)
  local jobs = self.open
  self.open = false
  return jobs
end

local function flush_later(self, jobs)
  self.runner:pause(self.wait) -- or until it stops
  if self.open == jobs then execute(self.runner, close(self)) end
end

--- Adds a message; whoever brings the last one handles the batch.
---@param message moonrabbit.Message
function Batch:handle(message)
  local runner = self.runner
  local job = runner:job(message)
  if not runner:claimed(job) then return end
  local jobs = self.open
  if not jobs then
    jobs = {}
    self.open = jobs
    if self.size > 1 then runner.runtime.spawn(flush_later, self, jobs) end
  end
  jobs[#jobs + 1] = job
  if #jobs >= self.size then return execute(runner, close(self)) end
end

--- Handles what there is.
function Batch:flush()
  local jobs = self.open
  if not jobs then return end
  self.runner.runtime.spawn(function()
    if self.open == jobs then execute(self.runner, close(self)) end
  end)
end

return Batch
