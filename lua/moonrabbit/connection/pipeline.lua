--- Many calls in one go, on a channel of their own: the next ones leave before the first is answered.
--
-- An error of the broker closes the channel, and what was sent behind it is not done. So the call that drew it
-- is told, and the rest goes on on a fresh channel. An error that ends the connection is put down to its call
-- where only one was out; else `connection._careful` is set, and the next time one goes out at once.
-- @module moonrabbit.connection.pipeline

local errors = require "moonrabbit.errors"

local pipeline = {}

-- Calls that are out at once. A channel error lets all that is out be sent again. More follow once half are answered: one
-- for each answer would be a write for each.
local WINDOW = 256

-- Whether the end of a session was the answer to this method.
function pipeline.is_answer(reason, method)
  return reason ~= nil and reason.class ~= nil and errors.method_name(reason.class, reason.method) == method
end

local function open(connection, session)
  local Channel = require "moonrabbit.channel"
  return Channel.open(connection, session, nil, 2)
end

-- Sends one; its call, or nil, err.
local function send(session, channel, step)
  local ok, status = channel._core:call(step.method, step.fields)
  if ok then return session:expect(channel._calls, step.method) end
  if status == "closed" then return nil, channel:_closed_error() end
  return nil, session:refusal(status, step.method)
end

-- Sends steps behind `sent`, up to `last`, into `calls`: the last that went; and why no more did.
local function send_more(session, channel, steps, calls, sent, last)
  while sent < last do
    local call, err = send(session, channel, steps[sent + 1])
    if not call then return sent, err end
    sent = sent + 1
    calls[sent] = call
  end
  return sent
end

-- From step `at` on: the number of the step that failed and why, or nil when all were answered.
local function run(connection, session, channel, steps, at, timeout)
  local window = connection._careful and 1 or WINDOW
  local calls, sent = {}, at - 1
  for answered = at, #steps do
    if sent - answered + 1 <= window / 2 then
      local problem
      sent, problem = send_more(session, channel, steps, calls, sent, math.min(#steps, answered + window - 1))
      if sent < answered then return answered, problem, 1 end -- else what stands before it is answered first
    end
    local result, err = session:await(calls[answered], timeout)
    if result == nil then return answered, err, sent - answered + 1 end
    calls[answered] = nil
    if steps[answered].done then steps[answered].done(result) end
  end
end

--- Runs steps in their order: { method, fields, done = fn(reply), failed = fn(err) → another step or nil }.
--- nil, err: the session has ended, or does not answer.
---@param steps table[]
---@param timeout number seconds for each answer
---@return true|nil, moonrabbit.Error?
function pipeline.run(connection, session, steps, timeout)
  local at = 1
  while at <= #steps do
    local channel, err = open(connection, session)
    if not channel then return nil, err end
    local failed_at, why, out = run(connection, session, channel, steps, at, timeout)
    if not failed_at then
      channel:_abandon()
      return true
    end
    local step = steps[failed_at]
    if session.state ~= "open" then
      if pipeline.is_answer(session.reason, step.method) then
        if out > 1 then connection._careful = true elseif step.ended then step.ended(session.reason) end
      end
      return nil, session.reason
    end
    if why.kind == "timeout" then
      channel:_abandon()
      return nil, why
    end
    channel:_abandon()
    local instead = step.failed(why)
    if instead then steps[failed_at] = instead end
    at = instead and failed_at or failed_at + 1
  end
  return true
end

return pipeline
