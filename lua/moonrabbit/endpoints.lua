--- Where to connect: a source of targets, asked anew for every round of attempts.
--
-- A source is any table with the methods of this one, which gives the same list each time, in its order.
-- A target is what `moonrabbit.connection.target` makes of a URI and the options.
--
-- | method | |
-- | --- | --- |
-- | `source:round()` → targets, or nil, err | to be tried one after the other; may yield. nil: the round has failed |
-- | `source:connected(target, session)` | it took us |
-- | `source:failed(target, err)` | it did not |
-- | `source:lost(target, err)` | it had taken us, and the connection ended |
-- | `source:attach(hooks)` | once, before the first round: `emit` and `move` of the connection |
-- | `source:close()` | the connection is closed for good |
--
-- All but `round` must not yield. A round whose every target fails with an error that is not temporary ends
-- the connection, and so does a nil, err of that kind; else the next round waits for the backoff.
-- @module moonrabbit.endpoints

local Endpoints = {}
Endpoints.__index = Endpoints

--- A list of targets that never changes.
---@param targets table[]
function Endpoints.new(targets)
  return setmetatable({ targets = targets }, Endpoints)
end

function Endpoints:round() return self.targets end

function Endpoints.attach() end
function Endpoints.failed() end
function Endpoints.connected() end
function Endpoints.lost() end
function Endpoints.close() end

return Endpoints
