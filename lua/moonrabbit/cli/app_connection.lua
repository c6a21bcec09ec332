--- Where an app that a command runs connects to: what its script says in `connect`, and over it, piece by piece, what
--- is said outside: on the command line, in files and in the environment. docs/configuration.md has the rule.

local credentials = require "moonrabbit.cli.credentials"
local output = require "moonrabbit.cli.output"
local uri = require "moonrabbit.uri"

local app_connection = {}

-- A URL from outside says where to connect, and so all that is about the place.
local about_the_place = { "uri", "endpoints", "sites", "mode", "shuffle", "near", "management", "smart", "vhost" }

-- What a URL may say besides: what it does not say, the script does.
local may_be_said = { "user", "password", "mechanism", "heartbeat", "frame_max", "channel_max", "connect_timeout" }

-- Of the script's TLS options, those that are not about the broker's name and whether to verify it.
local about_ourselves = { "ca", "cert", "key", "min_version" }

local function copy(given)
  local all = {}
  for name, value in pairs(given) do all[name] = value end
  return all
end

-- The log is the command's, and its runtime the native one.
local function own_options(app)
  local own = app._spec.connect
  if type(own) ~= "table" then return { uri = own } end
  local given = copy(own)
  given.log, given.runtime = nil, nil
  return given
end

-- The URL tells whether there is TLS.
local function tls_for(own, parsed)
  if not parsed.tls or type(own) ~= "table" then return nil end
  local tls = {}
  for _, name in ipairs(about_ourselves) do
    if parsed.tls[name] == nil then tls[name] = own[name] end
  end
  return tls
end

local function take_place(given, parsed)
  for _, name in ipairs(about_the_place) do given[name] = nil end
  for _, name in ipairs(may_be_said) do
    if parsed[name] ~= nil then given[name] = nil end
  end
  given.tls = tls_for(given.tls, parsed)
end

local function merged(own, outer)
  if type(own) ~= "table" or type(outer) ~= "table" then return outer or own end
  local all = copy(own)
  for name, value in pairs(outer) do all[name] = value end
  return all
end

local function uris_of(given, list)
  list[#list + 1] = given.uri
  for _, text in ipairs(given.endpoints or {}) do list[#list + 1] = text end
  for _, name in ipairs { "primary", "standby" } do
    if given.sites and type(given.sites[name]) == "table" then uris_of(given.sites[name], list) end
  end
  return list
end

local function keep_password(given)
  if type(given.password) == "string" then output.secret(given.password) end
  if type(given.password) == "function" then given.password = require("moonrabbit.secret").from(given.password) end
end

-- Whatever is a password here will be in no log.
local function keep_secrets(given)
  for _, text in ipairs(uris_of(given, {})) do
    local parsed = uri.parse(text)
    if parsed and parsed.password ~= parsed.user then output.secret(parsed.password) end
  end
  keep_password(given)
  given.sites = given.sites and copy(given.sites)
  for name, site in pairs(given.sites or {}) do
    if type(site) == "table" then
      given.sites[name] = copy(site)
      keep_password(given.sites[name])
    end
  end
end

--- Options of connect, and where the URL is from; nil and what is wrong with them.
---@param app moonrabbit.App
---@param args table
---@return table|nil, string problem_or_source
function app_connection.options(app, args)
  local given = own_options(app)
  local outer, parsed, source = credentials.resolve(args, uris_of(given, {})[1])
  if not outer then return nil, parsed end
  if credentials.is_outside(source) then take_place(given, parsed) else outer.uri = nil end
  outer.tls = merged(given.tls, outer.tls)
  for name, value in pairs(outer) do given[name] = value end
  keep_secrets(given)
  if args.timeout then given.timeout, given.connect_timeout = args.timeout, args.timeout end
  return given, source
end

-- Complaints of the checks name no line of ours.
local NOWHERE = -100

--- The places of such options, as they are listed: for each the options of a connection that goes there alone, the
--- target that they make (moonrabbit.connection.target), and which of two sites it belongs to. nil and what is wrong.
---@param given table
---@return { options: table, parsed: table, site: string? }[]|nil, string? problem
function app_connection.places(given)
  local cluster = require "moonrabbit.cluster"
  local context = { runtime = require "moonrabbit.runtime.native", log = function() end }
  local sound, problem = pcall(cluster.source, given, context, NOWHERE)
  if not sound then return nil, problem end
  local list = cluster.listed(given)
  for _, place in ipairs(list) do
    place.parsed = assert(require("moonrabbit.connection.target")(place.options.uri, place.options))
  end
  return list
end

--- The place of such options, or the first of several, as moonrabbit.connection.target makes it.
---@param given table
---@return table|nil, string? problem
function app_connection.first(given)
  local list, problem = app_connection.places(given)
  return list and list[1].parsed, problem
end

return app_connection
