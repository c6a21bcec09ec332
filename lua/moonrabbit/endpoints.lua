--- Where to connect: a source of targets, asked anew for every round of attempts.
--
-- A source is any table with the methods of this one.
-- A target is what `moonrabbit.connection.target` makes of a URI and the options.
--
-- | method | |
-- | --- | --- |
-- | `source:round()` → targets, or nil, err | to be tried one after the other; may yield. nil: the round has failed |
-- | `source:connected(target, session)` | it took us |
-- | `source:failed(target, err)` | it did not. A source whose round has left out others that may take us sets err.temporary |
-- | `source:lost(target, err, unrestored)` | it had taken us, and the connection ended; unrestored: before all was restored on it |
-- | `source:due()` → seconds or nil | (may be missing) there is another place to try then: the next round waits no longer |
-- | `source:attach(hooks)` | once, before the first round: `emit` and `move` of the connection |
-- | `source:close()` | the connection is closed for good |
--
-- All but `round` must not yield. A round whose every target fails with an error that is not temporary ends
-- the connection, and so does a nil, err of that kind; else the next round waits for the backoff.
--
-- A connection that takes the place of an ended one has a source that knows what that one's had learned: each
-- constructor takes the earlier source (nginx workers: moonrabbit.resty.options).
-- @module moonrabbit.endpoints

local uri = require "moonrabbit.uri"

local Endpoints = {}
Endpoints.__index = Endpoints

--- A list of targets, tried in its order. But one that has fallen silent, or let an attempt run into its timeout, goes to
-- the end until another one is found: a frozen node takes connections and says nothing, and waiting for that would be a
-- part of every failover.
---@param targets table[]
---@param past table? the source of the connection before this one
function Endpoints.new(targets, past)
  local self = setmetatable({ targets = targets }, Endpoints)
  local silent = past and past.silent and uri.endpoint(past.silent)
  for _, target in ipairs(targets) do
    if uri.endpoint(target) == silent then self.silent = target end
  end
  return self
end

function Endpoints:round()
  local silent = self.silent
  if not silent then return self.targets end
  local list = {}
  for _, target in ipairs(self.targets) do
    if target ~= silent then list[#list + 1] = target end
  end
  list[#list + 1] = silent
  return list
end

function Endpoints:failed(target, err) self.silent = err.kind == "timeout" and target or self.silent end
function Endpoints:lost(target, err) self.silent = err.kind == "timeout" and target or nil end
function Endpoints:connected() self.silent = nil end
function Endpoints.attach() end
function Endpoints.close() end

return Endpoints
