--- Who waits for one of a keeper's messages, or for all.
-- @module moonrabbit.publisher.keeper

local core = require "moonrabbit.core"

local acked, outcome_of, conclude_core = core.acked, core.outcome, core.conclude

---@class moonrabbit.publisher.Keeper
local Keeper = {}

-- ---- For one ----------------------------------------------------------------------------------------

-- Takes back what was never on the wire.
local function withdraw(self, confirmation, n)
  if self._outbox or not self._unsent or n < self._unsent or n <= self._sent then return false end
  self.waiters:settled(confirmation)
  conclude_core(confirmation, "lost")
  local message = self.ring:at(n)
  if type(message) == "table" then self:_over(message) end
  self.ring:settle(n)
  self:_advance()
  return true
end

local function too_late(self, confirmation, n, timeout, own)
  local session = self.channel._session
  local state = not self._up and ": the connection is down, and recovering"
    or session.held and ": " .. session.held or session.blocked and ": the broker has blocked publishing" or ""
  if own and withdraw(self, confirmation, n) then
    return session:error(self._up and (session.blocked or session.held) and "blocked" or "timeout",
      ("the message was not sent within %g s%s"):format(timeout, state), { unsent = true })
  end
  return session:error("timeout", ("the broker has not confirmed the message within %g s%s"):format(timeout, state))
end

-- Answers as core.acked does.
local function wait_until(self, confirmation, deadline, own)
  local now, current = self.runtime.now, self.runtime.current
  local ok = false
  local waiter = self.waiters:join(confirmation, own)
  local session = self.channel._session
  if current and not current() then
    session:try_flush() -- a plain script: no other task could add to this write
  else
    session:touch()
  end
  repeat
    local left = deadline - now()
    if left <= 0 then break end
    self.waiters:block(self.channel._session, waiter, left, own)
    ok = acked(confirmation)
  until ok ~= false
  self.waiters:leave(waiter)
  return ok
end

--- Waits for one confirmation. `own`: the caller alone hears of its failure, and of nothing else when it was
--- never sent: then it is taken back.
---@package
function Keeper:_wait(confirmation, timeout, own)
  local ok = acked(confirmation)
  if ok then return true end
  local _, _, n = outcome_of(confirmation)
  if not n then return self.channel:_wait(confirmation, timeout, own) end
  timeout = timeout or self.channel.timeout
  if ok == false and timeout > 0 then
    ok = wait_until(self, confirmation, self.runtime.now() + timeout, own)
    if ok then return true end
  end
  if ok == nil then return nil, self:_failure(confirmation) end
  return nil, too_late(self, confirmation, n, timeout, own)
end

--- See Channel:_condition_of.
---@package
function Keeper:_condition_of(confirmation)
  local _, _, n = outcome_of(confirmation)
  if not n then return self.channel:_condition_of(confirmation) end
  return self.waiters:stay(confirmation).condition, self.runtime
end

-- ---- For all ----------------------------------------------------------------------------------------

local function all_failed(self, failed)
  local first = failed[1].err
  local err = self.channel._session:error(first.kind, ("%d publishes failed; the first: %s"):format(
    #failed + (failed.more or 0), first.message),
    { code = first.code, class = first.class, method = first.method, temporary = first.temporary })
  err.failed = failed
  return err
end

--- Waits until nothing is unsettled, as Channel:wait_for_confirms.
function Keeper:wait(timeout)
  local session, now = self.channel._session, self.runtime.now
  local deadline = now() + timeout
  session:touch()
  while self.ring.first <= self.ring.last do
    local left = deadline - now()
    if left <= 0 then break end
    self.channel._session:block(self._settled, left)
  end
  local failed, pending = self._failures, self:unconfirmed()
  self._failures = {}
  if pending == 0 and #failed == 0 then return true end
  if pending == 0 then return nil, all_failed(self, failed) end
  local err = self.channel._session:error("timeout", ("%d publishes were not confirmed within %g s"):format(pending,
    timeout))
  err.pending, err.failed = pending, failed
  return nil, err
end

return Keeper
