--- A connection that is kept, as moonrabbit.metrics.connections looks at connections: one, whichever it is now.
-- @module moonrabbit.resty.metrics.kept

---@class moonrabbit.resty.metrics.Kept
---@field connection moonrabbit.Connection?  while it stands
---@field reason moonrabbit.Error?           why it does not
local Kept = {}
Kept.__index = Kept

function Kept:state() return self.connection and self.connection:state() or "recovering" end
function Kept:blocked() return self.connection:blocked() end

function Kept:on(event, fn)
  self.heard[event] = fn
  return function() self.heard[event] = nil end
end

--- It stands, for the first time or again.
---@param connection moonrabbit.Connection
function Kept:opened(connection)
  if self.stood then self.heard.recovered() end
  self.stood, self.reason = true, nil
  self.connection, self._session = connection, connection._session
  self.shared:touch()
end

--- It was lost, or could not be made; nil: it has ended as it should.
---@param err moonrabbit.Error?
function Kept:lost(err)
  self.connection, self._session, self.reason = nil, nil, err
  if err then self.heard.recovering(err) end
  self.shared:touch()
end

local kept = {}

---@param shared moonrabbit.resty.Metrics hears of every change
---@return moonrabbit.resty.metrics.Kept
function kept.new(shared) return setmetatable({ shared = shared, heard = {} }, Kept) end

return kept
