--- De-duplication around a run: a message whose key is done is acked without being handled again.
--
-- `dedupe` of a consumer is a store, or a table around one:
--
-- | field | |
-- | --- | --- |
-- | `store` | `begin(self, key, lease) -> "new" | "running" | "done" | "refused", err | nil, err`, `commit(self, key)`, `abort(self, key)`, maybe `attach(self, runtime)` |
-- | `key` | "message_id" (the default), "header:NAME", or a function of the message |
-- | `lease` | seconds after which the claim of a process that died is void; 300 and at least the timeout and a minute by default, and a breaker's `hold` besides |
-- | `away` | what to do while the store cannot be reached: "wait" (the default) until it can, or "go_on" without it |
-- | `missing` | of a message without a key: "handle" (the default) it, or "fail" it for good |
--
-- A key is a string that is not empty, or a number; of anything else a message fails.
--
-- A key that is claimed is waited for, without a place among the `concurrency`: its owner commits, aborts,
-- or dies and its lease ends. What was handled is committed before it is acked; a store that is away then is waited
-- for too, so a message is never silently handled twice. "go_on" says so in the log and by an event.
--
-- A store with `joined` commits the handler's own work with the key. When that commit fails the work is undone: the
-- message is handled again once the database is back, or, where it was not away, has failed. While a retry waits in the
-- process its transaction is rolled back.
-- @module moonrabbit.app.runner.dedupe

local Breaker = require "moonrabbit.app.flow.breaker"
local failure = require "moonrabbit.app.failure"
local protect = require "moonrabbit.protect"

---@class moonrabbit.app.Dedupe
local Dedupe = {}
Dedupe.__index = Dedupe

local FIRST_WAIT, LONGEST_WAIT = 0.05, 2

local function by_message_id(message)
  local id = message.message_id
  if id or type(message) == "userdata" then return id end
  return message.properties.message_id
end

local function by_header(name)
  return function(message) return message.headers[name] end
end

local function key_function(key)
  if type(key) == "function" then return key end
  if key == nil or key == "message_id" then return by_message_id end
  return by_header(key:match "^header:(.+)$")
end

-- A breaker may hold a message that has its key.
local function default_lease(consumer)
  local breaker = consumer.breaker
  return math.max(300, (consumer.timeout or 0) + 60) + (breaker and Breaker.hold_of(breaker) or 0)
end

---@param consumer table compiled
---@param runner table
---@return moonrabbit.app.Dedupe
function Dedupe.new(consumer, runner)
  local given = consumer.dedupe
  local store = given.store or given
  local plain = given.store and given or {}
  if store.attach then store:attach(runner.runtime) end
  local key = key_function(plain.key)
  return setmetatable({
    store = store, runner = runner, key = key,
    lease = plain.lease or default_lease(consumer), timeout = consumer.timeout,
    go_on = plain.away == "go_on", missing = plain.missing or "handle", joined = store.joined or false,
    quick = store.quick == true and key == by_message_id, -- nothing of it throws or waits
  }, Dedupe)
end

local function call(self, method, key, lease)
  local ok, answer, err = protect(self.store[method], self.store, key, lease)
  if not ok then
    if answer == self.runner.runtime.cancelled and answer ~= nil then error(answer, 0) end
    return nil, failure.text(answer)
  end
  return answer, err
end

local function say_away(self, what, err)
  local runner = self.runner
  if not self.said then
    self.said = true
    runner.log("error", ("the de-duplication store of '%s' cannot be reached (%s: %s): %s"):format(runner.queue, what,
      tostring(err), self.go_on and "going on without it, so duplicates may be handled" or "waiting for it"))
  end
  runner:event("dedupe_away", { queue = runner.queue, going_on = self.go_on, error = tostring(err) })
end

local function back_again(self)
  self.said = false
  self.runner.log("warn", ("the de-duplication store of '%s' can be reached again"):format(self.runner.queue))
end

-- A key that is no string with something in it: nil where there is none. All messages with an empty id would be one.
local function other_key(key)
  if key == nil or key == "" then return nil end
  if type(key) == "number" then return tostring(key) end
  error(("it is a %s, and no string or number"):format(type(key)), 0)
end

-- The key, what the store says about it, and why.
local function begin(self, message)
  local key = self.key(message)
  if type(key) ~= "string" or key == "" then
    key = other_key(key)
    if key == nil then return nil end
  end
  return key, self.store:begin(key, self.lease)
end

local function key_of(self, message)
  local key = self.key(message)
  return type(key) == "string" and key or other_key(key)
end

-- Which of the two threw: the key or the store?
local function explain(self, message, problem)
  if problem == self.runner.runtime.cancelled and problem ~= nil then error(problem, 0) end
  local ok, key = protect(key_of, self, message)
  if ok then return key, nil, failure.text(problem) end
  return failure.new("error", "the de-duplication key: " .. failure.text(key), { value = key })
end

--- Asks the store about a message, without a throw: whether that went well, and then the key, what the store says
--- ("new": it is the caller's now), and why.
---@param message moonrabbit.Message
---@param now number?  the runtime's time, where the caller has it
---@return boolean ok, any key_or_problem, string? state, any err
function Dedupe:ask(message, now)
  if not self.quick then return protect(begin, self, message) end
  local key = by_message_id(message)
  if key == nil or key == "" then return true end
  return true, key, self.store:begin(key, self.lease, now)
end

--- Claims a job's key, with the first answer of `ask`. "go": handle it; "duplicate": it was handled before; "stopped":
--- the runner stops, or the message has gone back meanwhile; or a failure.
---@param job table
---@return "go"|"duplicate"|"stopped"|moonrabbit.Failure
function Dedupe:claim(job, ok, key, state, err)
  local wait = FIRST_WAIT
  while true do
    if not ok then key, state, err = explain(self, job.message, key) end
    if state == "new" then
      job.claim, job.claimed = key, self.runner.now()
      if self.said then back_again(self) end
      return "go"
    end
    if state == "done" then return "duplicate" end
    if state == "refused" then return failure.new("permanent", tostring(err), { value = err }) end
    if key == nil then
      if self.missing == "handle" then return "go" end
      return failure.new("permanent", "the message has no de-duplication key")
    end
    if type(key) ~= "string" then return key end
    if state ~= "running" then
      say_away(self, "begin", err or state)
      if self.go_on then return "go" end
    end
    if not self.runner:rest(job, wait) then return "stopped" end
    wait = math.min(LONGEST_WAIT, wait * 2)
    ok, key, state, err = self:ask(job.message)
  end
end

-- The handler's work was undone: what that means for the job, as Dedupe:commit says.
local function undone(self, job, problem)
  local wait, away = FIRST_WAIT, false
  while true do
    local ok, key, state, err = self:ask(job.message)
    if ok and state == "done" then return nil end -- the answer was lost, and not the commit
    if ok and state == "new" then
      job.claim, job.claimed = key, self.runner.now()
      if self.said then back_again(self) end
      if away then return "again" end
      self:abort(job)
      return failure.new("error", "the transaction was not committed: " .. failure.text(problem))
    end
    if not ok or state ~= "running" then
      away = true
      say_away(self, "commit", ok and err or key)
      if self.go_on then return "again" end
    end
    if not self.runner:pause(wait) then return "again" end
    wait = math.min(LONGEST_WAIT, wait * 2)
  end
end

--- It was handled. Nil; or, where the store has undone the handler's work with its own (`joined`): the failure that this
--- is, or "again" when the database was away, and it is to be handled once more.
---@param job table
---@param now number?  the runtime's time, where the caller has it
---@return moonrabbit.Failure|"again"|nil
function Dedupe:commit(job, now)
  local key, wait = job.claim, FIRST_WAIT
  job.claim = false
  if self.quick then
    self.store:commit(key, now)
    return nil
  end
  local done, committed, why = protect(self.store.commit, self.store, key)
  if done and committed and not self.said then return end
  if self.joined then
    if done and committed then return back_again(self) end
    local again = undone(self, job, done and why or committed)
    return again
  end
  while true do
    local ok, err = call(self, "commit", key)
    if ok then
      if self.said then back_again(self) end
      return
    end
    say_away(self, "commit", err)
    if self.go_on or not self.runner:pause(wait) then return end
    wait = math.min(LONGEST_WAIT, wait * 2)
  end
end

-- Whether a claim holds until the job has waited and run once more.
local function outlasts(self, job, delay)
  return self.runner.now() + delay + (self.timeout or 0) <= job.claimed + self.lease
end

--- The job waits to run again in this process. Its claim stays, unless it holds a transaction open, or would end
--- meanwhile; what is given back is claimed again then.
---@param job table
---@param delay number seconds
function Dedupe:pause(job, delay)
  if job.claim and not self.joined and outlasts(self, job, delay) then return end
  self:abort(job)
  job.reclaim = true
end

--- What a store that lives in this process knows, for the one that takes its place; nil where it lives elsewhere.
---@return table?
function Dedupe:state()
  return self.store.state and self.store:state()
end

--- Takes it over.
---@param state table
function Dedupe:restore(state)
  if self.store.restore and self.store ~= state then self.store:restore(state) end
end

--- It was not: somebody may try again. What cannot be said to the store, its lease says.
---@param job table
function Dedupe:abort(job)
  local key = job.claim
  if not key then return end
  job.claim = false
  local ok, err = call(self, "abort", key)
  if not ok then say_away(self, "abort", err) end
end

return Dedupe
