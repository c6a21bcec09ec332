-- Commands of a process of their own, and a broker that repeats the password it was given in what it says: no line of
-- theirs may hold it, wherever it was said.
local core = require "moonrabbit.core"
local fake = require "support.fake_broker"
local http_server = require "support.http_server"
local native = require "moonrabbit.runtime.native"
local process = require "support.process"

local unpack = rawget(table, "unpack") or rawget(_G, "unpack")

local SECRET = "p@ss/4711&hush"
local ENCODED = "p%40ss%2F4711%26hush"

-- Refuses whoever logs in: "no, ... is not <what>".
local function refusing_broker(what)
  local server = assert(native.listen("127.0.0.1", 0))
  local function serve(client)
    if not client:read(8) then return end
    client:write(fake.method(0, 10, 10, "\0\9" .. core.encode_table { product = "Fake" } .. fake.long "PLAIN"
      .. fake.long "en_US"))
    if not client:read(65536) then return end
    client:write(fake.method(0, 10, 50, fake.u16(403) .. fake.short("wrong password " .. what) .. fake.u32(0)))
    client:read(65536)
    client:close()
  end
  native.spawn(function()
    local client = server:accept()
    while client do
      native.spawn(serve, client)
      client = server:accept()
    end
  end)
  return server
end

describe("secrets of the command line", function()
  local server, files, where

  before_each(function()
    server, files = refusing_broker(SECRET .. " or " .. ENCODED), {}
    where = ("127.0.0.1:%d/"):format(server:port())
  end)

  after_each(function()
    server:close()
    for _, path in ipairs(files) do os.remove(path) end
  end)

  local function file(text)
    files[#files + 1] = process.file(text)
    return files[#files]
  end

  -- What a command has written at its end, or once it holds `until_text`.
  local function printed(words, env, until_text)
    local running = process.start({ "bin/moonrabbit", unpack(words) }, { env = env,
      unset = { "MOONRABBIT_URL", "AMQP_URL", "MOONRABBIT_PASSWORD", "MOONRABBIT_MANAGEMENT_URL" } })
    local function all() return running:out() .. running:err() end
    local deadline = native.now() + 20
    repeat native.sleep(0.02)
    until running:code() or until_text and all():find(until_text, 1, true) or native.now() > deadline
    local text = all()
    running:stop()
    return text
  end

  local function hides(text)
    assert.truthy(text:find("wrong password *** or ***", 1, true), text)
    assert.is_nil(text:find("hush", 1, true), text) -- its digits may be in a port
  end

  it("are in no complaint, whether the URL, the environment or a file says them", function()
    hides(printed({ "purge", "q" }, { AMQP_URL = ("amqp://me:%s@%s"):format(ENCODED, where) }))
    hides(printed({ "purge", "q", "--url", "amqp://me@" .. where }, { MOONRABBIT_PASSWORD = SECRET }))
    hides(printed { "purge", "q", "--url", "amqp://me@" .. where, "--password-file", file(SECRET .. "\n") })
  end)

  it("are in no report of the doctor, as lines and as JSON", function()
    local env = { AMQP_URL = ("amqp://me:%s@%s"):format(ENCODED, where) }
    hides(printed({ "doctor" }, env))
    hides(printed({ "doctor", "--json" }, env))
  end)

  describe("of an app", function()
    local function app(connect, more)
      return file(("local mr = require 'moonrabbit' %s return mr.app { name = 'a', connect = { %s },"
        .. " queues = { q = {} }, consumers = { { queue = 'q', handler = print } } }"):format(more or "", connect))
    end

    local function each_source()
      return {
        app(("uri = 'amqp://me@%s', password = '%s'"):format(where, SECRET)),
        app(("uri = 'amqp://me@%s', password = function() return '%s' end"):format(where, SECRET)),
        app(("uri = 'amqp://me@%s', password = mr.secret.file '%s'"):format(where, file(SECRET))),
        app(("endpoints = { 'amqp://me:something@127.0.0.1:1/', 'amqp://me:%s@%s' }"):format(ENCODED, where)),
        app(("sites = { primary = { uri = 'amqp://127.0.0.1:1/' }, standby = { uri = 'amqp://%s', password = '%s' } }")
          :format(where, SECRET)),
      }
    end

    it("are in no line of its log", function()
      for _, script in ipairs(each_source()) do
        hides(printed({ "run", script }, nil, "wrong password"))
        hides(printed({ "run", script, "--log-format", "json" }, nil, "wrong password"))
      end
    end)

    it("are in no answer of the commands that connect as it does", function()
      for _, script in ipairs(each_source()) do
        hides(printed { "topology", "plan", script })
        hides(printed { "doctor", "--app", script })
      end
    end)

    it("are in no mistake of its script", function()
      local text = printed { "run", "--check",
        app("", ("error('wrong password ' .. assert(mr.secret.file '%s'()) .. ' or ***')"):format(file(SECRET))) }
      hides(text)
    end)
  end)

  it("of the management API are in no complaint", function()
    local api = http_server.start(function()
      return http_server.response(401, ('{"error":"not_authorised","reason":"wrong password %s or %s"}'):format(SECRET,
        ENCODED))
    end)
    finally(function() api.stop() end)
    hides(printed { "cluster", "status", "--management", ("http://me:%s@127.0.0.1:%d"):format(ENCODED, api.port) })
    hides(printed({ "cluster", "status", "--management", "http://127.0.0.1:" .. api.port },
      { AMQP_URL = ("amqp://me:%s@%s"):format(ENCODED, where) }))
  end)
end)
