--- Where a connection goes when there is more than one place: the modes "direct", "proxy" and "smart", services of
-- DNS, and two sites. docs/clusters.md is the manual.
--
-- Makes the source of targets (moonrabbit.endpoints) that the options of moonrabbit.connect ask for.
-- @module moonrabbit.cluster

local options = require "moonrabbit.options"
local resolver = require "moonrabbit.cluster.resolver"
local target = require "moonrabbit.connection.target"
local Endpoints = require "moonrabbit.endpoints"
local List = require "moonrabbit.cluster.list"
local Quarantine = require "moonrabbit.cluster.quarantine"

local check = options.check

local cluster = {}

---@class moonrabbit.SmartOptions
---@field refresh number?    seconds between looks at the management API; 30 by default, 0: only at each reconnect
---@field wait number?       seconds that a connect waits for the leader of `near` to be learned; 1 by default
---@field follow boolean?    the connection moves when the leader of `near` has moved; false by default
---@field discover boolean?  whether to use nodes that are not listed; true by default
---@field address (fun(node: string, listener: table): string?, integer?)?  host and port of a learned node, where what it says of itself cannot be reached from here
---@field quarantine moonrabbit.QuarantineOptions?  how long nodes that failed are left alone

---@class moonrabbit.SiteOptions
---@field uri string?         as the option of a connection; so are all but `check`
---@field endpoints string[]? the same
---@field vhost string?       the same
---@field user string?        the same
---@field password (string|fun(): string|nil, string?)?  the same
---@field tls (boolean|moonrabbit.TlsOptions)?           the same
---@field mode string?        the same
---@field shuffle boolean?    the same
---@field near string?        the same
---@field management (string|table)?      the same
---@field smart moonrabbit.SmartOptions?  the same
---@field check (fun(connection: moonrabbit.Connection): boolean?, string?)?  true: the site is fit. Of the standby: publishing is held until it says so. Of the primary: it is not gone back to before. May wait

---@class moonrabbit.SitesOptions
---@field primary moonrabbit.SiteOptions  where to be
---@field standby moonrabbit.SiteOptions  where to go when the primary cannot be reached
---@field after number?    seconds that the primary must have been unreachable; 30 by default
---@field hold number?     seconds that it must have been healthy before the connection goes back; 60 by default, math.huge: never
---@field probe number?    seconds between looks at the primary, and between calls of the standby's check; 5 by default

local smart_options = {
  refresh = options.seconds, wait = options.seconds, follow = options.boolean, discover = options.boolean,
  address = options.callback, quarantine = options.table,
}

local places = {
  mode = options.one_of("direct", "proxy", "smart"),
  shuffle = options.boolean,
  near = options.shortstr,
  management = options.either(options.string, options.table),
  smart = options.table,
  dns = options.table,
}

--- The options of a connection that are about this.
cluster.options = options.merge(places, { sites = options.table })

local endpoint_list = options.list_of(options.string, "a list of URIs", 1)

local site_options = options.merge(places, {
  uri = options.string, endpoints = endpoint_list, vhost = options.shortstr, user = options.string,
  password = options.either(options.string, options.callback), tls = options.either(options.boolean, options.table),
  check = options.callback,
})
site_options.dns = nil

local function pause(value)
  if type(value) == "number" and value > 0 then return nil end
  return "a number of seconds above 0"
end

local sites_options = {
  primary = options.table, standby = options.table, after = options.seconds, hold = options.seconds, probe = pause,
}

-- ---- Checks -----------------------------------------------------------------------------------------

-- Which options make no sense together; throws at `level` of the caller.
local function check_place(what, opts, listed, level)
  level = level + 1
  if opts.uri and opts.endpoints then
    error(what .. ": options 'uri' and 'endpoints' exclude each other", level)
  end
  if opts.mode == "proxy" and #listed > 1 then
    error(what .. ": mode \"proxy\" takes one endpoint, the balancer's", level)
  end
  if opts.mode ~= "smart" then
    for _, name in ipairs { "near", "management", "smart" } do
      if opts[name] ~= nil then error(what .. ": option '" .. name .. "' needs mode = \"smart\"", level) end
    end
  end
  if opts.smart then
    check(what .. ": smart", opts.smart, smart_options, level)
    if opts.smart.quarantine then
      check(what .. ": smart.quarantine", opts.smart.quarantine, Quarantine.options, level)
    end
  end
end

local function listed_of(what, opts, level)
  local listed = {}
  for i, text in ipairs(opts.endpoints or { opts.uri or "amqp://" }) do
    local problem
    listed[i], problem = target(text, opts)
    if not listed[i] then error(what .. ": " .. problem, level + 1) end
  end
  return listed
end

-- ---- Sources ----------------------------------------------------------------------------------------

local function place(what, opts, context, level)
  level = level + 1
  local listed = listed_of(what, opts, level)
  check_place(what, opts, listed, level)
  if opts.mode == "smart" then
    local smart = require("moonrabbit.cluster.smart").new(listed, opts, context, level)
    return smart
  end
  -- What looks at a site of mode "smart" has its source, and goes to the nodes that were learned, too.
  local past = context.past
  if past and past.known then listed = past:known() end
  local plain = not opts.shuffle
  for _, each in ipairs(listed) do plain = plain and not each.srv end
  if plain then return Endpoints.new(listed, past) end
  return List.new(listed, opts, context)
end

local function merged(opts, site)
  local all = {}
  for name, value in pairs(opts) do all[name] = value end
  all.sites = nil
  for name, value in pairs(site) do all[name] = value end
  all.check = nil
  return all
end

local function two_sites(opts, context, level)
  level = level + 1
  local given = check("connect: sites", opts.sites, sites_options, level)
  for _, name in ipairs { "uri", "endpoints", "mode", "shuffle", "near", "management", "smart" } do
    if opts[name] ~= nil then
      error("connect: with sites the option '" .. name .. "' belongs into each of them", level)
    end
  end
  local sources = {}
  for _, name in ipairs { "primary", "standby" } do
    local what = "connect: sites." .. name
    if not given[name] then error(what .. " is missing", level) end
    check(what, given[name], site_options, level)
    sources[name] = place(what, merged(opts, given[name]), { runtime = context.runtime, log = context.log,
      past = context.past and context.past.sources[name] }, level)
  end
  return require("moonrabbit.cluster.sites").new(sources, given, context)
end

--- The source of targets for checked options of a connection; throws at `level` of the caller.
---@package
---@param opts moonrabbit.ConnectOptions
---@param context { runtime: table, log: function, past: table? } past: the source of the connection before this one
---@param level integer
---@return table source
function cluster.source(opts, context, level)
  level = level + 1
  if opts.dns then check("connect: dns", opts.dns, resolver.options, level) end
  -- No tail calls: they would take a level away.
  local source
  if opts.sites then
    source = two_sites(opts, context, level)
  else
    source = place("connect", opts, context, level)
  end
  return source
end

--- The listed places of checked options, one by one: options of connections that go there and nowhere else.
---@package
---@param opts moonrabbit.ConnectOptions
---@return { options: moonrabbit.ConnectOptions, site: string? }[]
function cluster.listed(opts)
  local list = {}
  local function add(all, site)
    for _, text in ipairs(all.endpoints or { all.uri or "amqp://" }) do
      local own = merged(all, { uri = text })
      for _, name in ipairs { "endpoints", "mode", "shuffle", "near", "management", "smart" } do own[name] = nil end
      list[#list + 1] = { options = own, site = site }
    end
  end
  if not opts.sites then
    add(opts)
  else
    for _, name in ipairs { "primary", "standby" } do add(merged(opts, opts.sites[name] or {}), name) end
  end
  return list
end

--- The options of a connection that only looks whether the primary site is there.
---@package
---@param opts moonrabbit.ConnectOptions
---@return moonrabbit.ConnectOptions
function cluster.probe_options(opts)
  local all = merged(opts, opts.sites.primary)
  all.mode, all.near, all.management, all.smart = nil, nil, nil, nil
  all.reconnect = false
  return all
end

return cluster
