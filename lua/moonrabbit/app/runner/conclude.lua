--- What becomes of a message once its handler has run: the second half of the runner.
-- @module moonrabbit.app.runner

local failure = require "moonrabbit.app.failure"
local protect = require "moonrabbit.protect"
local retry = require "moonrabbit.app.retry"

---@class moonrabbit.app.Runner
local Runner = {}

--- A copy that could not be made gives the original back after so many seconds, and after twice as many each
--- time that follows.
local FIRST_DELAY, LONGEST_DELAY = 1, 30
--- Seconds between two looks whether the original is still to be settled.
local LOOK = 1

local function ended(self, job, outcome, seconds, detail, failed)
  if self.settled then self.settled(self.queue, outcome, seconds, detail, job.message, failed) end
end

-- ---- Success ----------------------------------------------------------------------------------------

-- What the store has undone with its commit (see Dedupe:commit) is not acked: that is returned.
---@package
---@param now number?  the time, where it has just been looked at
function Runner:acked(job, outcome, seconds, detail, now)
  if job.claim then
    local undone = self.dedupe:commit(job, now)
    if undone then return undone end
  end
  local ok, why = self.ack(job.message)
  if not ok and why == "settled" and not self.said_settled then
    self.said_settled = true
    self.log("warn", ("a handler of '%s' settles its messages itself: the app does it when it returns"):format(
      self.queue))
  end
  if self.settled then self.settled(self.queue, outcome, seconds, detail or why, job.message) end
end

--- Acks what was handled before.
---@package
function Runner:duplicate(job)
  self.settle.ack(job.message)
  ended(self, job, "duplicate", 0)
end

-- ---- Back to the queue ------------------------------------------------------------------------------

--- Gives a message back. kind: "nack" by default; "reject" for what may be poison.
---@package
function Runner:give_back(job, why, kind)
  if job.claim then self.dedupe:abort(job) end
  if self.breaker then self.breaker:withdraw(job.of or job) end
  self.settle.back(job.message, kind or "nack")
  ended(self, job, "requeue", 0, why)
end

-- Why a message does not run, or does not run on.
local function why_not(self, job)
  if self.stopping then return "stopping" end
  local outstanding, gone = self.settle.outstanding(job.message)
  if not outstanding then return gone end
  local breaker = self.breaker
  if breaker and breaker.state ~= "closed" then return ("the breaker has held it for %g s"):format(breaker.hold) end
  return "its handler's task was cancelled"
end

--- Gives back what has not run, or not to its end.
---@package
function Runner:put_back(job) self:give_back(job, why_not(self, job)) end

-- ---- Copies -----------------------------------------------------------------------------------------

-- The broker may take the message back meanwhile: then nothing is waited for, and its place is free.
local function pause_while_held(self, job, seconds)
  local till = self.now() + seconds
  repeat
    local goes_on = self:pause(math.min(LOOK, math.max(0, till - self.now())))
  until not goes_on or self.now() >= till or not self.settle.outstanding(job.message)
end

local function copy_failed(self, job, what, err)
  self.bad_copies = math.min(self.bad_copies + 1, 10)
  local delay = math.min(LONGEST_DELAY, FIRST_DELAY * 2 ^ (self.bad_copies - 1))
  self.log("error", ("a message of '%s' goes back to its queue in %g s, for it cannot be %s: %s"):format(self.queue,
    delay, what == "retry" and "sent to wait for its retry" or "parked", tostring(err)))
  self:event("copy_failed", { queue = self.queue, what = what, error = tostring(err) })
  pause_while_held(self, job, delay)
  self:give_back(job, tostring(err), "reject")
end

local function stays(self, job, delay)
  if self.order then return true end -- or a later message of its key would pass it
  local in_process = self.disposal.in_process
  return in_process ~= nil and in_process(self.disposal, job.message, delay) == true
end

-- The message's own headers leave no room for those of a copy.
local function is_too_large(err)
  return type(err) == "table" and err.kind == "overflow" and not err.temporary
end

-- disposal answers true once the copy is confirmed and in a queue. Then, and only then, the original is acked. A retry
-- that no copy can be made for, or whose step turns out to be unusable, is waited for here: its delay is returned.
local function copy(self, job, what, detail, failed, seconds)
  if job.claim then self.dedupe:abort(job) end
  local ok, done, err = protect(self.disposal[what], self.disposal, job.message, detail, failed, job.attempt)
  if not ok then
    if done == self.runtime.cancelled and done ~= nil then err = "the app stops" else err = failure.text(done) end
    done = nil
  end
  if not done then
    local outstanding, gone = self.settle.outstanding(job.message)
    if not outstanding then return self:give_back(job, gone) end
    if what == "retry" and (is_too_large(err) or stays(self, job, detail)) then return detail end
    return copy_failed(self, job, what, err)
  end
  self.bad_copies = 0
  self.settle.ack(job.message)
  ended(self, job, what, seconds, detail, failed)
end

-- Without a queue of the app's for dead letters the broker does with it what the queue says.
local function park(self, job, reason, failed, seconds)
  if self.consumer.dead_letter ~= false then return copy(self, job, "dead_letter", reason, failed, seconds) end
  if job.claim then self.dedupe:abort(job) end
  self.settle.reject(job.message)
  ended(self, job, "dead_letter", seconds, reason, failed)
end

-- ---- The retry policy -------------------------------------------------------------------------------

-- The delay that a policy gives; nil, why there is none, and the failure to tell of.
local function ask(self, job, failed)
  local delay, reason, told = retry.decide(self.consumer.retry, job.message, failed, job.attempt)
  if reason == "retry policy" then self.log("error", ("'%s': %s"):format(self.queue, told.message)) end
  return delay, reason, told or failed
end

-- ---- Failure ----------------------------------------------------------------------------------------

-- The handler has settled its message, or the broker has taken it back: nothing is left to decide.
local function not_ours(self, job, failed, why, seconds)
  if why == "closed" then
    if job.claim then self.dedupe:abort(job) end
    return ended(self, job, "requeue", seconds, "closed", failed)
  end
  if job.claim then self.dedupe:commit(job) end
  self.log("error", ("a handler of '%s' settled its message itself and failed then: %s"):format(self.queue,
    failed.traceback or failed.message))
  ended(self, job, "drop", seconds, "settled by its handler, which failed: " .. failed.message, failed)
end

-- It runs again after `delay` seconds, in this process.
local function run_again(self, job, delay, seconds, failed)
  if self.dedupe then self.dedupe:pause(job, delay) end
  job.attempt = job.attempt + 1
  ended(self, job, "retry", seconds, delay, failed)
  return delay
end

-- What is told of a failure: which attempt it was, and for how long the message has been failing here.
local function note(self, job, failed)
  job.attempt = job.attempt or self.disposal:attempt(job.message)
  job.first = job.first or self.now()
  failed.attempt, failed.since = job.attempt, self.now() - job.first
  if self.failed then self.failed(self.queue, failed, job.message) end
end

-- The seconds after which the job is to run again in the process, or nil.
local function fail(self, job, failed, seconds, asked)
  note(self, job, failed)
  local outstanding, why = self.settle.outstanding(job.message)
  if not outstanding then return not_ours(self, job, failed, why, seconds) end
  local delay, reason
  if asked and asked.action == "dead_letter" then
    reason = asked.reason
  elseif asked and asked.after and not failed.permanent then
    delay = asked.after
  else
    delay, reason, failed = ask(self, job, failed)
  end
  if not delay then return park(self, job, reason, failed, seconds) end
  if stays(self, job, delay) then return run_again(self, job, delay, seconds, failed) end
  local waits = copy(self, job, "retry", delay, failed, seconds)
  return waits and run_again(self, job, waits, seconds, failed)
end

local function failure_of_outcome(asked)
  if asked.action == "dead_letter" then
    return failure.new("asked", asked.reason, { permanent = true, value = asked })
  end
  return failure.new("asked", "the handler asked for " .. tostring(asked), { value = asked })
end

-- ---- What others make of it -------------------------------------------------------------------------

local function breaker_hears(self, job, ok, now)
  local breaker = self.breaker
  local changed = breaker:result(job.of or job, ok, now)
  if not changed then return end
  self.log("warn", changed == "open"
    and ("the breaker of '%s' is open: too much fails, so it pauses for %g s"):format(self.queue, breaker.pause)
    or ("the breaker of '%s' is closed: it goes on"):format(self.queue))
  self:event("breaker_" .. changed, { queue = self.queue, pause = breaker.pause })
  if changed == "closed" then self.wake:broadcast() end
end

local function rolled_back(self, canary, report)
  self.log("warn", ("the canary '%s' is rolled back: %s"):format(canary.name, report.reason))
  report.queue = self.queue
  self:event("canary_rollback", report)
  if canary.on_rollback then self.runtime.spawn(canary.on_rollback, report) end
end

local function canaries_hear(self, job, ok, seconds, now)
  local trials = job.trials
  for i = 1, #trials, 2 do
    local canary, version = trials[i], trials[i + 1]
    local report = canary:record(version, ok, seconds, now)
    if self.canary then self.canary(canary.name, version, ok, seconds) end
    if report then rolled_back(self, canary, report) end
  end
end

--- Does with a message what its run asks for; the seconds after which the job is to run again in the process,
--- or nil.
---@package
---@param job table
---@param failed moonrabbit.Failure?
---@param asked moonrabbit.Outcome?
---@return number?
function Runner:conclude(job, failed, asked)
  local now = self.now()
  local seconds = now - job.started
  local ok = not failed and (not asked or asked.action == "drop")
  if job.trials then canaries_hear(self, job, ok, seconds, now) end
  if self.breaker then
    breaker_hears(self, job, ok or (failed or asked).permanent or asked and asked.action == "dead_letter" or false, now)
  end
  if ok then
    local undone = self:acked(job, asked and "drop" or "ok", seconds)
    if not undone then return nil end
    if undone == "again" then return 0 end
    failed, asked = undone, nil
  end
  return fail(self, job, failed or failure_of_outcome(asked), seconds, asked)
end

return Runner
