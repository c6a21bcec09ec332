--- What keeps a connection alive: its state, and the task that brings it back.
-- @module moonrabbit.connection

local described = require "moonrabbit.described"
local errors = require "moonrabbit.errors"
local uri = require "moonrabbit.uri"
local states = require "moonrabbit.connection.states"
local dial = require "moonrabbit.connection.dial"
local recovery = require "moonrabbit.connection.recovery"
local protect = require "moonrabbit.protect"

local huge = math.huge

-- What is to be sent has so many seconds to leave before a connection moves.
local MOVING = 2

---@class moonrabbit.Connection
local Connection = {}

-- ---- The state --------------------------------------------------------------------------------------

--- Something happened: takes the state that it leads to, and says so.
---@package
function Connection:_fire(event, err)
  local from = self._state
  local to = states.next(from, event)
  if not to then error(("a connection that is '%s' knows no '%s'"):format(from, event), 2) end
  self._state, self._reason = to, err
  if to == "open" then self:_event "open" elseif to == "closed" then self:_event("closed", err) end
  self:_event("state", to, err)
  self._changed:broadcast()
  self:_ring()
end

--- Why a call cannot be made now.
---@package
function Connection:_closed_error()
  local reason = self._reason
  if self._state == "recovering" then return recovery.meanwhile(reason, "the connection is coming back") end
  if self._state == "closed" and reason then return reason end
  return self._session:error("closed", "the connection is closing", { temporary = false })
end

--- Takes a session as the connection's own.
---@package
function Connection:_adopt(session, target)
  self._session, self._target, self.endpoint = session, target, session.endpoint
  self._opened_at = self._runtime.now()
  self:_fire "connected"
  if session.blocked then self:_event("blocked", session.blocked) end
end

--- Whether what lives on a session that has ended comes back: if so, what calls are told meanwhile.
---@package
function Connection:_survives(session, err)
  if not self._policy then return nil end
  local state = self._state
  if state == "recovering" or state == "open" and session == self._session and session.state ~= "closing" then
    return recovery.meanwhile(err, "the connection is coming back")
  end
end

--- What a session has to say.
---@package
function Connection:_heard(session, event, ...)
  if session ~= self._session then return end
  if event == "closed" then
    self:_lost(...)
  elseif event == "state" then
    if self._state == "open" then self:_fire "close" end
  else
    self:_event(event, ...)
    if event == "blocked" or event == "unblocked" then self:_ring() end
  end
end

-- ---- Coming back ------------------------------------------------------------------------------------

-- It is over: nothing comes back.
local function finish(self, event, err)
  self:_fire(event, err)
  self._source:close()
  local channels = self._channels
  self._channels = {}
  for channel in pairs(channels) do channel:_ended(err) end
  local session = self._arriving
  if session then
    session:start_close()
    session:try_flush()
  end
  self._nudge:broadcast()
end

-- Waits for the backoff; false when there are no more attempts. The connection may be closed afterwards.
local function wait_for_turn(self, err)
  local delay, attempt = self._backoff:next()
  if not delay then return false end
  local due = self._source.due and self._source:due()
  if due and due < delay then delay = due end
  self:_event("recovering", err, attempt, delay)
  local now = self._runtime.now
  local deadline = now() + delay
  while self._state == "recovering" and now() < deadline do
    local left = deadline - now()
    self._nudge:wait(left < huge and left or nil)
  end
  return true
end

-- What restores threw when the session was the connection's own already: some of it is back, and nobody would do the
-- rest. The session ends, and with it the task: losing it has started another.
local function begin_anew(self, session, problem)
  local text = "restoring threw: " .. described(problem)
  self._log("error", text)
  if session.state == "open" then session:fail(text) end
  return true
end

-- One round, and what is to be restored. Answers true; or nil, err, and whether that is for good.
local function attempt(self)
  local function go_on() return self._state == "recovering" end
  local session, target, permanent = dial.round(self, go_on)
  if not session then return nil, target, permanent end
  self._arriving = session
  local whole, done, err = protect(recovery.run, self, session, target)
  self._arriving = nil
  if whole and done then return true end
  if not whole and self._session == session then return begin_anew(self, session, done) end
  -- It had taken us, and is no better than one that had not.
  if whole and self._state == "recovering" then self._source:lost(target, err, true) end
  if session.state == "open" and self._session ~= session then
    session:start_close()
    session:try_flush()
  end
  if not whole then error(done, 0) end
  return nil, err, false
end

local function come_back(self, err)
  while self._state == "recovering" do
    if not wait_for_turn(self, err) then return finish(self, "gave_up", err) end
    if self._state ~= "recovering" then return end
    local done, problem, permanent = attempt(self)
    if done or self._state ~= "recovering" then return end
    err = problem or err
    self._log("info", "reconnecting failed: " .. tostring(err))
    if permanent then return finish(self, "gave_up", err) end
    self._reason = err
  end
end

-- A mistake in here must not leave a connection that neither lives nor dies.
local function guarded(self, err)
  local whole, problem = protect(come_back, self, err)
  if whole then return end
  local text = tostring(problem)
  self._log("error", "reconnecting threw: " .. text)
  if self._state == "recovering" then
    finish(self, "gave_up", errors.new { kind = "closed", message = "reconnecting failed: " .. text,
      temporary = true, endpoint = self.endpoint })
  end
end

-- The connection after this one begins with what this one had learned, whichever was made last.
local function bequeath(self, err)
  self._source:lost(self._target, err)
  if self._heritage then self._heritage.source = self._source end
end

--- The current session has ended.
---@package
function Connection:_lost(err)
  if self._state == "closing" or not self._policy then
    if self._state == "open" then bequeath(self, err) end
    self:_fire("ended", err)
    self._repairs:stop()
    self._source:close()
    self._channels = {}
    return
  end
  self._source:lost(self._target, err)
  self._backoff:lasted(self._runtime.now() - self._opened_at)
  self._repairs:stop()
  self:_fire("lost", err)
  self._log("warn", "the connection was lost: " .. tostring(err))
  self._runtime.spawn(guarded, self, err)
end

--- The first connect; nil, err.
---@package
function Connection:_start()
  local session, target, permanent = dial.round(self)
  while not session and self._policy and self._policy.initial and not permanent do
    local delay = self._backoff:next()
    if not delay then break end
    self._log("info", "connecting failed: " .. tostring(target))
    self._runtime.sleep(delay)
    session, target, permanent = dial.round(self)
  end
  if not session then
    self:_fire("failed", target)
    self._source:close()
    return nil, target
  end
  self:_adopt(session, target)
  self._log("debug", "connected to " .. uri.redacted(target))
  return true
end

--- Leaves a broker that is well for another one: says goodbye, and comes back as after a loss.
---@package
function Connection:_move(why)
  local session = self._session
  if self._state ~= "open" or session.state ~= "open" then return end
  self._log("info", "the connection moves: " .. why)
  session:flush(MOVING)
  if self._state ~= "open" or session ~= self._session or session.state ~= "open" then return end
  session.engine:close(200, why)
  session:finish(session:error("closed", "the connection moves: " .. why, { temporary = true }))
end

--- Closes it while it is coming back: at once.
---@package
function Connection:_stop()
  finish(self, "close", errors.new { kind = "closed", temporary = false, endpoint = self.endpoint,
    message = "the connection was closed by this side" })
end

--- Waits until it is open: true at once when it is; nil, err when it is closed for good, or of kind
--- `timeout`. For tasks that publish or declare by plain channels and met `closed` with err.temporary.
---@param timeout number? seconds; the connection's by default
---@return true|nil, moonrabbit.Error?
function Connection:wait_open(timeout)
  if timeout ~= nil then
    local options = require "moonrabbit.options"
    options.argument("Connection:wait_open", "timeout", timeout, options.seconds)
  end
  timeout = timeout or self.call_timeout
  local now = self._runtime.now
  local deadline = now() + timeout
  while self._state == "recovering" do
    local left = deadline - now()
    if left <= 0 then
      return nil, errors.new { kind = "timeout", endpoint = self.endpoint,
        message = ("the connection did not come back within %g s: %s"):format(timeout, self._reason.message) }
    end
    self._changed:wait(left < huge and left or nil)
  end
  if self._state == "open" then return true end
  return nil, self:_closed_error()
end

return Connection
