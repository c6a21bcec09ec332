--- De-duplication around a run: a message whose key is done is acked without being handled again.
--
-- `dedupe` of a consumer is a store, or a table around one:
--
-- | field | |
-- | --- | --- |
-- | `store` | `begin(self, key, lease) -> "new" | "running" | "done" | "refused", err | nil, err`, `commit(self, key)`, `abort(self, key)`, maybe `attach(self, runtime)` |
-- | `key` | "message_id" (the default), "header:NAME", or a function of the message |
-- | `lease` | seconds after which the claim of a process that died is void; 300 and at least the timeout and a minute by default |
-- | `away` | what to do while the store cannot be reached: "wait" (the default) until it can, or "go_on" without it |
-- | `missing` | of a message without a key: "handle" (the default) it, or "fail" it for good |
--
-- A key that is claimed is waited for, without a place among the `concurrency`: its owner commits, aborts,
-- or dies and its lease ends. What was handled is committed before it is acked; a store that is away then is waited
-- for too, so a message is never silently handled twice. "go_on" says so in the log and by an event.
-- @module moonrabbit.app.runner.dedupe

local failure = require "moonrabbit.app.failure"
local protect = require "moonrabbit.protect"

---@class moonrabbit.app.Dedupe
local Dedupe = {}
Dedupe.__index = Dedupe

local FIRST_WAIT, LONGEST_WAIT = 0.05, 2

local function by_header(name)
  return function(message) return message.headers[name] end
end

local function key_function(key)
  if type(key) == "function" then return key end
  if key == nil or key == "message_id" then
    return function(message) return message.properties.message_id end
  end
  return by_header(key:match "^header:(.+)$" or key)
end

---@param consumer table compiled
---@param runner table
---@return moonrabbit.app.Dedupe
function Dedupe.new(consumer, runner)
  local given = consumer.dedupe
  local store = given.store or given
  local plain = given.store and given or {}
  if store.attach then store:attach(runner.runtime) end
  return setmetatable({
    store = store, runner = runner, key = key_function(plain.key),
    lease = plain.lease or math.max(300, (consumer.timeout or 0) + 60),
    go_on = plain.away == "go_on", missing = plain.missing or "handle",
  }, Dedupe)
end

local function call(self, method, key, lease)
  local ok, answer, err = protect(self.store[method], self.store, key, lease)
  if not ok then
    if answer == self.runner.runtime.cancelled and answer ~= nil then error(answer, 0) end
    return nil, tostring(answer)
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
  if not self.said then return end
  self.said = false
  self.runner.log("warn", ("the de-duplication store of '%s' can be reached again"):format(self.runner.queue))
end

--- Claims a job's key. "go": handle it; "duplicate": it was handled before; "stopped": the runner stops, or the
--- message has gone back meanwhile; or a failure.
---@param job table
---@return "go"|"duplicate"|"stopped"|moonrabbit.Failure
function Dedupe:claim(job)
  local ok, key = protect(self.key, job.message)
  if not ok then return failure.new("error", "the de-duplication key: " .. tostring(key), { value = key }) end
  if key == nil then
    if self.missing == "handle" then return "go" end
    return failure.new("permanent", "the message has no de-duplication key")
  end
  key = tostring(key)
  local runner, wait = self.runner, FIRST_WAIT
  while true do
    local state, err = call(self, "begin", key, self.lease)
    if state == "new" then
      job.claim = key
      back_again(self)
      return "go"
    end
    if state == "done" then return "duplicate" end
    if state == "refused" then return failure.new("permanent", tostring(err), { value = err }) end
    if state ~= "running" then
      say_away(self, "begin", err or state)
      if self.go_on then return "go" end
    end
    if not runner:rest(job, wait) then return "stopped" end
    wait = math.min(LONGEST_WAIT, wait * 2)
  end
end

--- It was handled.
---@param job table
function Dedupe:commit(job)
  local key, wait = job.claim, FIRST_WAIT
  if not key then return end
  job.claim = false
  while true do
    local ok, err = call(self, "commit", key)
    if ok then return back_again(self) end
    say_away(self, "commit", err)
    if self.go_on or not self.runner:pause(wait) then return end
    wait = math.min(LONGEST_WAIT, wait * 2)
  end
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
