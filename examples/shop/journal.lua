--- An observer that writes a line for everything that happens to a message: what was written stays, even after a
-- kill -9. `moonrabbit.metrics` counts in memory instead.
--   delivered ID first|again      settled OUTCOME      event NAME WHY
local shop = require "shop"

return function(name)
  local file

  local function note(...)
    if not file then
      file = assert(io.open(shop.path(name .. ".journal"), "a"))
      file:setvbuf "line" -- a line is one write: whole, or not there
    end
    file:write(table.concat({ ... }, " "), "\n")
  end

  return {
    delivered = function(_, msg)
      note("delivered", tostring(msg.message_id), msg.redelivered and "again" or "first")
    end,
    settled = function(_, outcome) note("settled", outcome) end,
    event = function(what, fields)
      note("event", what, (tostring(fields.reason or fields.error or ""):gsub("%c", " ")))
    end,
  }
end
