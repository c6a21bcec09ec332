--- How a channel's publishes end, and who waits for that.
-- @module moonrabbit.channel

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"

local core_acked, core_outcome = core.acked, core.outcome
local argument, seconds = options.argument, options.seconds

---@class moonrabbit.Channel
local Channel = {}

-- How many failed publishes are kept for wait_for_confirms.
local MAX_FAILURES = 10000

-- ---- Outcomes ---------------------------------------------------------------------------------------

-- What a confirmation that failed failed of; the engine keeps only the outcome.
local failure_of = setmetatable({}, { __mode = "k" })

--- The error of a confirmation that is settled and not acked.
---@package
function Channel:_failure(confirmation)
  local err = failure_of[confirmation]
  if err then return err end
  local outcome = core_outcome(confirmation)
  if outcome == "nacked" then
    err = self._session:error("nacked", "the broker refused the message (basic.nack)")
  elseif outcome == "unroutable" then
    err = self._session:error("unroutable", "no queue takes the message", { code = 312 })
  else
    local reason = self._lost_by or self:_closed_error()
    err = self._session:error(reason.kind, "the outcome of the publish is unknown: " .. reason.message,
      { code = reason.code, class = reason.class, method = reason.method, temporary = reason.temporary })
  end
  failure_of[confirmation] = err
  return err
end

-- Whoever waits for the last confirm goes on.
local function all_settled(self)
  if self._core:unconfirmed() == 0 then self._settled:broadcast() end
end

-- `_notice`, where somebody has set it, is called when publishes were settled, and must not yield: what it does
-- not look at itself is kept for nobody.
---@package
function Channel:_confirmed()
  local waiters = self._waiters
  if waiters.count > 0 then waiters:wake() end
  self._room:signal()
  all_settled(self)
  if self._notice then self._notice() end
  if self._publisher then self._publisher:_confirmed() end
end

---@package
function Channel:_returned(message, seq)
  if seq then
    self._returns = self._returns or {}
    self._returns[seq] = { message.reply_code, message.reply_text }
  end
  self:_emit("return", message)
end

-- The error of a publish that was refused or came back.
local function error_of(self, seq, outcome)
  local returned = self._returns and self._returns[seq]
  if returned then self._returns[seq] = nil end
  if outcome == "unroutable" then
    return self._session:error("unroutable", ("no queue takes the message: %s (%s)"):format(
      returned and returned[2] or "NO_ROUTE", returned and returned[1] or 312),
      { code = returned and returned[1] or 312, class = 60, method = 40 })
  end
  return self._session:error("nacked", "the broker refused the message (basic.nack)", { class = 60, method = 120 })
end

-- For wait_for_confirms.
local function remember(self, seq, outcome, err)
  local failures = self._failures
  if #failures < MAX_FAILURES then
    failures[#failures + 1] = { seq = seq, outcome = outcome, err = err }
  else
    failures.more = (failures.more or 0) + 1
  end
end

---@package
function Channel:_failed(seq, outcome, confirmation)
  local err = error_of(self, seq, outcome)
  local own = false
  if confirmation then
    if self._publisher and self._publisher:_failed(outcome, confirmation, err) then return end
    failure_of[confirmation] = err
    own = self._waiters:settled(confirmation) or confirmation == self._own
  end
  if not own and not self._notice then remember(self, seq, outcome, err) end
  local rpc_call = self._rpc_failed
  if rpc_call then rpc_call(seq, err) end
  self._room:signal()
  all_settled(self)
  if self._notice then self._notice() end
end

-- ---- Waiting for one --------------------------------------------------------------------------------

--- A condition for whoever cannot say when they wait no longer: it is broadcast when the confirmation is settled. And
--- the runtime that it is of.
---@package
function Channel:_condition_of(confirmation)
  return self._waiters:stay(confirmation).condition, self._runtime
end

-- A script's main chunk reads what comes by itself as long as there is nobody else to run. Answers as
-- core.acked does.
local function wait_alone(self, confirmation, deadline, own)
  local session = self._session
  local acked = false
  session:try_flush() -- no other task could add to this write
  self._own = own and confirmation
  while acked == false and not self._closed and session:read_alone(deadline) do acked = core_acked(confirmation) end
  self._own = nil
  return acked
end

-- In line with others, while the loop runs.
local function wait_in_loop(self, confirmation, deadline, own, flushed)
  local session, now = self._session, self._runtime.now
  local acked = false
  local waiter = self._waiters:join(confirmation, own)
  if not flushed then session:touch() end
  repeat
    local left = deadline - now()
    if left <= 0 then break end
    self._waiters:block(session, waiter, left, own)
    acked = core_acked(confirmation)
  until acked ~= false or self._closed
  self._waiters:leave(waiter)
  return acked
end

--- Waits for one confirmation. `own`: the failure is the caller's alone to hear of.
---@package
function Channel:_wait(confirmation, timeout, own)
  local acked = core_acked(confirmation)
  if acked then return true end
  if acked == nil or self._closed then return nil, self:_failure(confirmation) end
  timeout = timeout or self.timeout
  if timeout > 0 then
    local runtime = self._runtime
    local deadline = runtime.now() + timeout
    local script = runtime.current and not runtime.current()
    if script then acked = wait_alone(self, confirmation, deadline, own) end
    if acked == false and not self._closed then acked = wait_in_loop(self, confirmation, deadline, own, script) end
  end
  if acked then return true end
  if acked == nil or self._closed then return nil, self:_failure(confirmation) end
  return nil, self._session:error("timeout", ("the broker has not confirmed the message within %g s"):format(timeout)
    .. (self._session.blocked and " (it has blocked publishing)" or ""))
end

-- ---- Waiting for all --------------------------------------------------------------------------------

--- Waits until every publish of this channel is settled: true when all since the last call were
--- acked. Else err.failed is a list of { seq, outcome, err }, without those whose failure `publish`
--- has returned already; on a `timeout`, err.pending tells how many are not settled yet. err.kind is
--- otherwise the first failure's, or what ended the channel (`closed`, `channel`); on a channel that has come
--- back since, what was lost is told once, err.pending says how many. On a channel without confirms it throws.
---@param timeout number? seconds; the channel's by default
---@return true|nil, moonrabbit.Error?
function Channel:wait_for_confirms(timeout)
  if timeout ~= nil then argument("Channel:wait_for_confirms", "timeout", timeout, seconds) end
  if not self.confirm then error("Channel:wait_for_confirms: the channel was opened without confirm = true", 2) end
  timeout = timeout or self.timeout
  local session, now = self._session, self._runtime.now
  local deadline = now() + timeout
  session:touch()
  local core_channel = self._core
  local pending = core_channel:unconfirmed()
  local failed = self._failures
  while pending > 0 and not self._closed and self._core == core_channel do
    local left = deadline - now()
    if left <= 0 then break end
    session:block(self._settled, left)
    pending = core_channel:unconfirmed()
  end
  -- Another task that waited may have taken them, and left new ones.
  if #failed == 0 then failed = self._failures end
  local err
  -- What this core channel lost is told to all who waited on it, what earlier ones did to the next who asks.
  local lost = math.max(core_channel:lost(), self._lost or 0)
  if lost > 0 then
    local reason = self._lost_by or self._closed
    err = session:error(reason.kind, "publishes may not have been settled: " .. reason.message,
      { code = reason.code, class = reason.class, method = reason.method, temporary = reason.temporary })
    err.pending = lost
    if not self._over then self._lost = nil end
  elseif pending > 0 then
    err = session:error("timeout", ("%d publishes were not confirmed within %g s"):format(pending, timeout))
    err.pending = pending
  elseif #failed > 0 then
    local first = failed[1].err
    err = session:error(first.kind, ("%d publishes failed; the first: %s"):format(#failed + (failed.more or 0),
      first.message),
      { code = first.code, class = first.class, method = first.method, temporary = first.temporary })
  else
    return true
  end
  if self._failures == failed then self._failures = {} end
  err.failed = failed
  return nil, err
end

--- How many publishes are not settled yet; 0 on a channel without confirms.
---@return integer
function Channel:unconfirmed()
  return self._core:unconfirmed()
end

return Channel
