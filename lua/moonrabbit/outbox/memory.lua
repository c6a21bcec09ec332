--- An outbox in memory: it outlives every connection, not the process.
-- @module moonrabbit.outbox.memory

---@class moonrabbit.outbox.Memory
local Memory = {}
Memory.__index = Memory

--- Opens an empty one.
function Memory.open()
  return setmetatable({ _rows = {}, _last = 0, _count = 0 }, Memory)
end

function Memory:add(record)
  self._last = self._last + 1
  self._rows[self._last] = record
  self._count = self._count + 1
  return self._last
end

function Memory:remove(rows)
  for _, row in ipairs(rows) do
    if self._rows[row] then
      self._rows[row] = nil
      self._count = self._count - 1
    end
  end
  return true
end

local function copy(record)
  return {
    exchange = record.exchange, routing_key = record.routing_key, mandatory = record.mandatory, props = record.props,
    body = record.body,
  }
end

function Memory:get(row)
  local record = self._rows[row]
  return record and copy(record)
end

function Memory:after(row)
  for n = row + 1, self._last do
    if self._rows[n] then return n, copy(self._rows[n]) end
  end
end

function Memory:count() return self._count end

function Memory.close() end

return Memory
