--- What a message is published with, checked and encoded: mistakes throw here, where they were made.
-- @module moonrabbit.resty.routes

local core = require "moonrabbit.core"
local options = require "moonrabbit.options"

local routes = {}

--- The options of a publish.
routes.options = options.merge(options.publish, { timeout = options.seconds })

--- Throws for a body that is none.
function routes.check_body(what, body, level)
  if type(body) ~= "string" then
    error(what .. ": the body must be a string, not a " .. type(body), level + 1)
  end
end

--- A route of the core. What is encoded here cannot be changed by its owner any more, and cannot surprise the sender.
function routes.route(what, opts, level)
  if opts == nil then opts = {} end
  options.check(what, opts, routes.options, level + 1)
  local ok, made = pcall(core.route, opts, true)
  if not ok then error(what .. ": " .. tostring(made), level + 1) end
  return made
end

--- That of a publish without options.
routes.empty = core.route({}, true)

return routes
