--- The runner of one consumer: from a delivery to its outcome.
--
-- A message becomes a job. A job waits for a place among the `concurrency`, claims its de-duplication key, passes the
-- breaker and the rate, and then its handler runs. What comes of that is concluded: acked, retried,
-- parked, dropped, or given back. The original is acked only after its outcome is safe: the handler has
-- succeeded, or the broker has confirmed the copy that disposal made.
--
-- A run that takes longer than `timeout` has failed. Its task is cancelled where the runtime can do that,
-- and then ends itself; a handler that goes on all the same is left to itself, its result will be ignored, and its
-- place is free again.
--
-- Everything that the runner needs is given to it, so it runs without a broker and on any clock:
--
-- | field of `env` | |
-- | --- | --- |
-- | `runtime` | docs/internals.md |
-- | `disposal` | `attempt`, `retry`, `dead_letter`, and maybe `in_process(message, delay) -> boolean`: sleep and call again instead |
-- | `settle` | moonrabbit.app.runner.settle by default |
-- | `observer` | docs/app.md |
-- | `app` | the handlers' second argument |
-- | `log` | function (level, text) |
-- @module moonrabbit.app.runner

local Batch = require "moonrabbit.app.flow.batch"
local Breaker = require "moonrabbit.app.flow.breaker"
local Dedupe = require "moonrabbit.app.runner.dedupe"
local Order = require "moonrabbit.app.flow.order"
local Rate = require "moonrabbit.app.flow.rate"
local Watch = require "moonrabbit.app.runner.watch"
local compile = require "moonrabbit.app.route.compile"
local conclude = require "moonrabbit.app.runner.conclude"
local default_settle = require "moonrabbit.app.runner.settle"
local failure = require "moonrabbit.app.failure"
local parts = require "moonrabbit.parts"
local protector = require "moonrabbit.app.protected"
local stopping = require "moonrabbit.app.runner.stopping"
local trace = require "moonrabbit.trace"
local waiting = require "moonrabbit.app.runner.waiting"

local type, select = type, select

---@class moonrabbit.app.Runner
---@field queue string
---@field consumer table       compiled
---@field in_flight integer    messages that have come and have no outcome yet
---@field stuck integer        handlers that run on although their time was over
local Runner = {}
Runner.__index = Runner

parts(Runner, waiting, conclude, stopping)

--- How long a handler that was cancelled may take to end before it is left to itself.
local GRACE = 1
--- Jobs that are kept for the next messages.
local SPARE_JOBS = 256

local function nothing() end

---@param consumer table compiled, of moonrabbit.app.plan
---@param env table
---@return moonrabbit.app.Runner
function Runner.new(consumer, env)
  local runtime, observer = env.runtime, env.observer or {}
  local settle = env.settle or default_settle
  local self = setmetatable({
    consumer = consumer, queue = consumer.queue, runtime = runtime, now = runtime.now, app = env.app,
    disposal = env.disposal, settle = settle, ack = settle.ack, log = env.log or nothing,
    resolve = consumer.target.resolve, constant = consumer.target.constant, canaries = consumer.target.canaries,
    protect = protector(runtime.cancelled), current = runtime.current or nothing,
    delivered = observer.delivered, settled = observer.settled, failed = observer.failed,
    gauge = observer.in_flight, canary = observer.canary, on_event = observer.event,
    limit = consumer.concurrency, running = 0, waiting = 0, slot = runtime.condition(),
    wake = runtime.condition(), quiet = runtime.condition(),
    in_flight = 0, stuck = 0, stopping = false, stopped = false, draining = false, bad_copies = 0,
    jobs = setmetatable({}, { __mode = "k" }), -- all there are
    spare = false, spares = 0,                 -- those that are free, each with the next one, and how many
  }, Runner)
  if consumer.trace ~= false and runtime.current then self.handling = trace.follow() end
  if consumer.timeout then
    self.watch = Watch.new(runtime, consumer.timeout, self.jobs, function(job) self:expire(job) end)
  end
  if consumer.dedupe then
    self.dedupe = Dedupe.new(consumer, self)
    self.joined = self.dedupe.joined
  end
  if consumer.rate then self.rate = Rate.new(consumer.rate, runtime.now()) end
  if consumer.breaker then self.breaker = Breaker.new(consumer.breaker) end
  if consumer.order_by then self.order = Order.new(consumer.order_by) end
  if consumer.batch then self.batch = Batch.new(consumer.batch, self) end
  if observer.runner then observer.runner(self) end
  return self
end

--- Tells the observer about something rare.
---@param name string
---@param fields table
function Runner:event(name, fields)
  if self.on_event then self.on_event(name, fields) end
end

-- ---- Jobs -------------------------------------------------------------------------------------------

---@package
function Runner:job(message)
  local job = self.spare
  if job then
    self.spare, self.spares = job.spare, self.spares - 1
  else
    job = {
      message = false, target = false, trials = nil, claim = false, attempt = nil, slot = false, started = 0,
      expired = false, abandoned = false, over = true, task = false, serial = 0, batch = false, of = false,
      first = false, reclaim = false, spare = false, claimed = 0,
    }
    self.jobs[job] = true
  end
  job.message = message
  local in_flight, gauge = self.in_flight + 1, self.gauge
  self.in_flight = in_flight
  if gauge then gauge(self.queue, in_flight) end
  return job
end

--- The job has its outcome.
---@package
function Runner:finish(job)
  if job.slot then
    job.slot = false
    if self.waiting > 0 then self:release() else self.running = self.running - 1 end
  end
  local in_flight, gauge = self.in_flight - 1, self.gauge
  self.in_flight = in_flight
  if gauge then gauge(self.queue, in_flight) end
  if in_flight == 0 and self.draining then self.quiet:broadcast() end
  job.message = false -- one by one, which is half the work
  job.target = false
  job.trials = nil
  job.attempt = nil
  job.claim = false
  job.task = false
  job.of = false
  job.first = false
  job.reclaim = false
  if job.abandoned then return end -- its handler still has it
  local spares = self.spares
  if spares == SPARE_JOBS then return end
  job.spare = self.spare
  self.spare = job
  self.spares = spares + 1
end

-- ---- Runs -------------------------------------------------------------------------------------------

local function execute(self, job)
  local message, target = job.message, self.constant or job.target
  if not target then
    target = self.resolve(message, job)
    if not target then error(compile.no_route(message), 0) end
    job.target = target
  end
  if type(target) == "function" then return target(message, self.app) end
  return target:run(message, self.app, job)
end

local function execute_batch(self, job) return self.constant(job.message, self.app) end

-- Whether the breaker and the rate let a job run; they may make it wait.
local function admitted(self, job, n)
  local breaker, since = self.breaker, nil
  while breaker do
    local answer = breaker:admit(job, self.now())
    if answer == true then break end
    since = since or self.now()
    local left = since + breaker.hold - self.now()
    if left <= 0 or not self:rest(job, math.min(answer, left), breaker) then return false end
  end
  local wait = self.rate and self.rate:take(n, self.now()) or 0
  if wait > 0 and not self:rest(job, wait) then
    if breaker then breaker:withdraw(job) end
    return false
  end
  return true
end

local STOPPED, LEFT = {}, {}

-- A cancellation that came when the handler had ended must not end the task's next wait.
local function wait_once(self) self.runtime.condition():wait(0) end

---@package
function Runner:swallow() self.protect(wait_once, self) end

-- Somebody else has concluded the job of a run meanwhile.
local function left(self, thrown)
  self.stuck = self.stuck - 1
  -- It was cancelled, and may not have noticed.
  if self.runtime.cancelled ~= nil and thrown ~= self.runtime.cancelled then self:swallow() end
  return LEFT
end

-- After a run: a failure, or nil and the outcome that its handler asked for; nothing after success.
local function ran(self, job, ok, ...)
  job.over = true
  if job.abandoned then return left(self, not ok and ... or nil) end
  if job.expired then
    if ok then self:swallow() end
    return failure.timeout(self.consumer.timeout)
  end
  if ok then
    local n = select("#", ...)
    if n == 0 then return end
    return failure.of_results(n, ...)
  end
  local thrown = ...
  if thrown == self.runtime.cancelled and thrown ~= nil then return STOPPED end
  return failure.of_thrown(thrown)
end

local function batch_ran(self, job, ok, ...)
  job.over = true
  if job.abandoned then return left(self, not ok and ... or nil) end
  job.n = select("#", ...)
  job.value, job.reason = ...
  return ok, ...
end

--- Runs a job's handler once: a failure, or nil and the outcome that it asked for, or nothing. STOPPED: it did not
--- run to its end; LEFT: somebody else has concluded the job meanwhile. `n`: of a batch, how many messages; then what
--- `protect` says is returned, and in the run what its handler did. `now`: the time, where it has just been looked at.
---@package
function Runner:attempt(job, n, now)
  if self.breaker or self.rate then
    if not admitted(self, job, n or 1) then return STOPPED end
    now = nil
  end
  if self.stopped then return STOPPED end
  local watch, task, handling = self.watch, self.current(), self.handling
  job.started = now or self.now()
  job.task = task
  job.over = false
  job.expired = false
  job.serial = job.serial + 1
  if handling and task then handling[task] = job end
  if watch and watch.idle then watch:start() end
  if n then return batch_ran(self, job, self.protect(execute_batch, self, job)) end
  return ran(self, job, self.protect(execute, self, job))
end

-- ---- Time is over -----------------------------------------------------------------------------------

-- The handler goes on, whatever it was told: another job takes its place, and its message.
local function abandon(self, job)
  if job.over then return end
  job.abandoned = true
  self.stuck = self.stuck + 1
  self.log("error", ("a handler of '%s' has not returned within %g s, and cannot be ended: %d such now"):format(
    self.queue, self.consumer.timeout, self.stuck))
  self:event("handler_stuck", { queue = self.queue, stuck = self.stuck })
  local twin = {}
  for key, value in pairs(job) do twin[key] = value end
  self.jobs[twin] = true
  twin.abandoned, twin.expired, twin.over = false, false, true
  for _, each in ipairs(twin.batch or {}) do each.of = twin end
  job.slot, job.claim = false, false
  if self.breaker then self.breaker:hand_over(job, twin) end
  self.runtime.spawn(function()
    if twin.batch then return self.batch:expired(twin) end
    self:go_on(twin, failure.timeout(self.consumer.timeout))
  end)
end

---@package
function Runner:expire(job)
  job.expired = true
  local cancel, serial = self.runtime.cancel, job.serial
  if not cancel or not job.task then return abandon(self, job) end
  cancel(job.task)
  self.runtime.spawn(function()
    self.runtime.sleep(math.min(GRACE, self.consumer.timeout))
    if job.serial == serial then abandon(self, job) end
  end)
end

-- ---- From a message to its outcome ------------------------------------------------------------------

--- Concludes what a run came to, and runs the job again as long as it is to be retried in the process.
---@package
function Runner:go_on(job, failed, asked)
  while true do
    if failed == LEFT then return end
    if failed == STOPPED then
      self:put_back(job)
      return self:finish(job)
    end
    local again = self:conclude(job, failed, asked)
    if not again or not self:rested(job, again) then return self:finish(job) end
    if job.reclaim and not self:reclaimed(job) then return end
    failed, asked = self:attempt(job)
  end
end

-- With what the store has answered first. False: the job has its outcome.
local function claimed(self, job, ...)
  local state = self.dedupe:claim(job, ...)
  if state == "go" then return true end
  if state == "duplicate" then
    self:duplicate(job)
  elseif state == "stopped" then
    self:put_back(job)
  else
    job.started = self.now()
    local again = self:conclude(job, state)
    if again and self:rested(job, again) then return self:reclaimed(job) end
  end
  self:finish(job)
  return false
end

--- Claims a job's de-duplication key; false: the job has its outcome.
---@package
function Runner:claimed(job)
  if not self.dedupe then return true end
  return claimed(self, job, self.dedupe:ask(job.message))
end

--- Claims a key again that was given back while the job waited to run once more; false: the job has its outcome.
---@package
function Runner:reclaimed(job)
  job.reclaim = false
  return self:claimed(job)
end

-- What cannot be put in its order does not run, however often it is tried.
local function without_order(self, job, problem)
  repeat
    job.started = self.now()
    local again = self:conclude(job, failure.new("error", problem))
  until not again or not self:rested(job, again)
  return self:finish(job)
end

local function single(self, message, waited, problem)
  local job = self:job(message)
  if self.running < self.limit then
    self.running = self.running + 1
  else
    self:acquire()
    waited = true
  end
  job.slot = true
  if waited and not self.settle.outstanding(message) then return self:go_on(job, STOPPED) end
  if problem then return without_order(self, job, problem) end
  local dedupe, now = self.dedupe, self.now()
  if dedupe then
    local ok, key, state, err = dedupe:ask(message, now)
    if ok and state == "new" and not dedupe.said then
      job.claim, job.claimed = key, now
    elseif not claimed(self, job, ok, key, state, err) then
      return
    end
    if not dedupe.quick or state ~= "new" then now = nil end -- that may have waited
  end
  local failed, asked = self:attempt(job, nil, now)
  if failed or asked or job.trials or self.breaker or self.joined then return self:go_on(job, failed, asked) end
  now = self.now()
  self:acked(job, "ok", now - job.started, nil, now)
  return self:finish(job)
end

--- Handles a message, in the task that calls; it waits as long as the message is handled by it.
---@param message moonrabbit.Message
function Runner:handle(message)
  if self.delivered then self.delivered(self.queue, message) end
  if self.stopped then
    self.settle.back(message, "nack")
    return
  end
  if self.order then return self.order:handle(self, message, single) end
  if self.batch then return self.batch:handle(message) end
  return single(self, message)
end

Runner.STOPPED, Runner.LEFT = STOPPED, LEFT

return Runner
