--- An observer that writes a line for everything that happens to a message: what was written stays, even after a
-- kill -9. `moonrabbit.metrics` counts in memory instead.
--   delivered ID first|again      settled OUTCOME      failed WHY      event NAME WHY
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

  local function line(text) return (tostring(text or ""):gsub("%c", " ")) end

  return {
    delivered = function(_, msg)
      note("delivered", tostring(msg.message_id), msg.redelivered and "again" or "first")
    end,
    settled = function(_, outcome) note("settled", outcome) end,
    failed = function(_, failure) note("failed", line(failure.message)) end,
    event = function(what, fields) note("event", what, line(fields.reason or fields.error)) end,
  }
end
